"""Many requests on one engine: continuous batching in a thread that owns it.

A round is

    drop what was cancelled -> admit -> one token for every sequence -> one chunk of prompts

so a long prompt delays the tokens of others by a chunk a round, and a sequence joins the batch as
soon as its prompt is computed. Several short prompts share a chunk; long ones take turns.

The cache is given out as it is needed, not by what a request may need at most. Where pages run out,
kept prefixes go first; then the request that came last waits again, and is computed anew later. Its
sampler and its text go on where they were. The request that came first always goes on.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from mla_deploy.errors import MlaError, SessionError
from mla_deploy.runtime.engine import Engine
from mla_deploy.runtime.loading import PREFILL_CHUNK
from mla_deploy.runtime.native import Logits
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.serve.job import Job, Listener, Piece
from mla_deploy.runtime.serve.prefix_cache import PrefixCache
from mla_deploy.runtime.session import Session

CHUNK_BESIDE_OTHERS = 128
"""Tokens of a prompt that are computed between two tokens of other sequences."""

Portion = tuple[Job, int]
"""A job, and how many of its ids shall be computed."""

STOPPED = SessionError("the server is stopping", hint="try again later")

log = logging.getLogger(__name__)


class FullError(Exception):
    """As many requests wait as may."""


class StoppedError(Exception):
    """The scheduler was stopped."""


def call_here(function: Callable[[], None]) -> None:
    """In the scheduler's own thread."""
    function()


class Scheduler:
    """Made running; ended by `stop`. Its methods may be called from any thread.

    Args:
        engine: which nobody else computes with.
        parallel: sequences that advance together.
        queue: requests that may wait beyond that.
        call: runs a function that calls the listeners, in a thread of the caller's choice.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        parallel: int,
        queue: int,
        call: Callable[[Callable[[], None]], object] = call_here,
    ) -> None:
        self._engine = engine
        self._parallel = parallel
        self._most = parallel + queue
        self._call = call
        self._page = engine.bundle.manifest.cache.page_tokens
        self._prefixes = PrefixCache()
        # Shared between threads, under the condition.
        self._changed = threading.Condition()
        self._arrived: list[Job] = []
        self._jobs = 0  # that have not ended
        self._order = 0
        self._stopping = False
        # The thread's own.
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()
        self._decoding: list[Job] = []
        self._news: list[tuple[Job, Piece]] = []
        self._thread = threading.Thread(target=self._run, name="mla-scheduler", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether `submit` would raise a FullError."""
        return self._jobs >= self._most

    def submit(self, prompt: list[int], options: GenerationOptions, listener: Listener) -> Job:
        """Begin a request; the listener gets its pieces, in order, up to one that is the last.

        Raises:
            SessionError: the prompt does not fit into the model's context or the cache.
            UsageError: it is empty or holds ids that the model does not have.
            FullError: too many requests wait.
            StoppedError: after `stop`.
        """
        ids = self._engine.check_ids(prompt)
        self._check_length(len(ids))
        job = Job(self._engine, ids, options, listener)
        with self._changed:
            if self._stopping:
                raise StoppedError
            if self.full:
                raise FullError
            self._jobs += 1
            self._order += 1
            job.order = self._order
            self._arrived.append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """End all requests with an error, and the thread. Returns when it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _check_length(self, length: int) -> None:
        context = self._engine.bundle.manifest.model.max_position_embeddings
        most = min(context, self._engine.capacity_tokens)
        if length > most:
            raise SessionError(
                "the prompt is too long",
                found=f"{length} tokens",
                allowed=f"{most}, of a context of {context} and a cache of "
                f"{self._engine.capacity_tokens}",
                hint="shorten the prompt",
            )

    # From here on in the scheduler's thread.

    def _run(self) -> None:
        while self._take_arrived():
            try:
                self._round()
            except Exception as error:  # a bug of ours must not end the server
                log.exception("a round of the scheduler failed")
                failure = SessionError(
                    "the server failed", found=type(error).__name__, hint="see the server's log"
                )
                for job in [*self._decoding, *self._prefilling] or [*self._waiting][:1]:
                    self._fail(job, failure)
            self._tell()
        for job in [*self._decoding, *self._prefilling, *self._waiting]:
            self._fail(job, STOPPED)
        self._tell()
        self._prefixes.clear()

    def _take_arrived(self) -> bool:
        """Wait for work. False: the end has come."""
        with self._changed:
            idle = not (self._decoding or self._prefilling or self._waiting)
            while idle and not self._arrived and not self._stopping:
                self._changed.wait()
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            return not self._stopping

    def _round(self) -> None:
        for job in [*self._decoding, *self._prefilling, *self._waiting]:
            if job.cancelled:
                self._drop(job)
        while self._waiting and self._admit(self._waiting[0]):
            self._prefilling.append(self._waiting.popleft())
        self._decode()
        self._tell()
        self._prefill()

    def _admit(self, job: Job) -> bool:
        """Give a job its session. False: there is no place for it yet."""
        active = len(self._decoding) + len(self._prefilling)
        if active == self._parallel:
            return False
        # The last token is computed in any case: its logits are wanted.
        session = self._prefixes.start(job.ids[:-1]) or self._engine.session()
        job.begin(session)
        # Besides, what prompts under way will take and a page for each sequence, or it would soon
        # have to wait again.
        promised = active + sum(self._growth(one, len(one.ids)) for one in self._prefilling)
        if not self._has_room([(job, len(job.ids))], promised):
            session.close()
            job.leave()
            if not active:  # it was alone before, too, and has grown as far as it can
                self._end(job, job.out_of_room())
            return False
        return True

    def _decode(self) -> None:
        self._advance([(job, len(job.ids)) for job in self._with_room()])

    def _with_room(self) -> list[Job]:
        """The decoding jobs, once each has room for a token."""
        while self._decoding:
            # All but the last of its tokens are in the cache; that one may begin a page.
            needed = sum(len(job.ids) % self._page == 1 for job in self._decoding)
            if self._free(needed):
                break
            last = self._last()
            if len(self._decoding) + len(self._prefilling) > 1:
                self._wait_again(last)
            else:
                self._end(last, last.out_of_room())
        return self._decoding.copy()

    def _prefill(self) -> None:
        """A chunk of tokens, of the prompts whose turn it is."""
        portions = self._portions()
        while not self._has_room(portions):
            self._wait_again(self._last())
            portions = self._portions()
        self._prefilling.rotate(-len(portions))
        self._advance(portions)

    def _portions(self) -> list[Portion]:
        """What makes up the next chunk: a part of a long prompt, or several short ones."""
        most = CHUNK_BESIDE_OTHERS if self._decoding else PREFILL_CHUNK
        portions: list[Portion] = []
        longest = 0
        for job in self._prefilling:
            end = min(len(job.ids), job.computed + most)
            longest = max(longest, end - job.computed)
            if (len(portions) + 1) * longest > most:  # a step computes padding, too
                break
            portions.append((job, end))
        return portions

    def _advance(self, portions: Sequence[Portion]) -> None:
        """Compute the ids of jobs up to an end, in one step, and the next token of those at theirs.

        Where that fails, each by itself: the others go on.
        """
        if not portions:
            return
        requests = [(_session(job), job.ids[job.computed : end]) for job, end in portions]
        wanted = [
            [len(ids) - 1] if end == len(job.ids) else []
            for (job, end), (_, ids) in zip(portions, requests, strict=True)
        ]
        try:
            rows = self._engine.step(requests, positions=wanted)
        except MlaError as error:
            if len(portions) == 1:
                self._fail(portions[0][0], error)
                return
            rows = []
        if not rows:  # no session has changed
            for one in portions:
                self._advance([one])
            return
        for (job, end), logits in zip(portions, rows, strict=True):
            job.computed = end
            if len(logits):
                self._pick(job, logits[0])

    def _growth(self, job: Job, length: int) -> int:
        """Pages that it may take to grow to a length."""
        copied = job.computed % self._page != 0  # if a kept prefix shares the last page
        return -(-length // self._page) - -(-job.computed // self._page) + copied

    def _has_room(self, portions: Sequence[Portion], promised: int = 0) -> bool:
        """Make room for portions, and so many pages besides, as `_free` does."""
        needed = promised + sum(self._growth(job, end) for job, end in portions)
        if self._free(needed):
            return True
        if promised or len(portions) > 1:
            return False
        ((job, end),) = portions  # no page has to be copied, now that there are no prefixes
        return _session(job).room >= end - job.computed

    def _free(self, pages: int) -> bool:
        """Make so many pages free by giving up prefixes; whether that was enough."""
        while pages and self._engine.free_tokens < pages * self._page:
            if not self._prefixes.evict():
                return False
        return True

    def _last(self) -> Job:
        """Of those under way, the one that came last."""
        return max([*self._decoding, *self._prefilling], key=lambda job: job.order)

    def _pick(self, job: Job, logits: Logits) -> None:
        if job in self._prefilling:
            self._prefilling.remove(job)
            self._decoding.append(job)
        try:
            piece = job.pick(logits)
        except MlaError as error:
            self._fail(job, error)
            return
        if piece.is_last:
            self._end(job, piece)
        else:
            self._news.append((job, piece))

    def _end(self, job: Job, piece: Piece) -> None:
        session = self._leave(job)
        if session is not None:
            self._prefixes.keep(session)
        with self._changed:
            self._jobs -= 1
        self._news.append((job, piece))

    def _fail(self, job: Job, error: MlaError) -> None:
        error.__traceback__ = error.__context__ = None  # their frames hold sessions
        self._drop(job)
        self._news.append((job, Piece(error=error)))

    def _drop(self, job: Job) -> None:
        """Forget a job and its session."""
        session = self._leave(job)
        if session is not None:
            session.close()
        with self._changed:
            self._jobs -= 1

    def _wait_again(self, job: Job) -> None:
        session = self._leave(job)
        if session is not None:
            session.close()
        self._waiting.appendleft(job)

    def _leave(self, job: Job) -> Session | None:
        for place in (self._decoding, self._prefilling, self._waiting):
            if job in place:
                place.remove(job)
        return job.leave()

    def _tell(self) -> None:
        """Send off the news."""
        news, self._news = self._news, []
        if not news:
            return

        def tell() -> None:
            for job, piece in news:
                job.listener(piece)

        try:
            self._call(tell)
        except Exception:  # nobody is there any more
            log.exception("the answers of the scheduler found no reader")


def _session(job: Job) -> Session:
    """Of a job that is under way."""
    assert job.session is not None
    return job.session
