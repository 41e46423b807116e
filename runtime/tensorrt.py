"""Running a bundle of TensorRT engines: the session API of `engine.py` over `tensorrt_graph.py`.

An engine computes one sequence at a time. With the plugin the cache is of pages, and there may be
several sessions and forks; a step for several computes one after the other. Without it there is one
session. Files of sessions are not to be had.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import Bundle
from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime.bundle_text import BundleText
from mla_deploy.runtime.closing import Closing
from mla_deploy.runtime.generation import GenerationResult
from mla_deploy.runtime.native import Logits, token_array
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.tensorrt_cache import Place
from mla_deploy.runtime.tensorrt_device import open_engine
from mla_deploy.runtime.tensorrt_generation import TensorRtGeneration
from mla_deploy.runtime.tensorrt_graph import TensorRtGraph


def load_tensorrt(bundle: Bundle, max_tokens: int | None) -> TensorRtEngine:
    """Load a bundle that was opened.

    Raises:
        UsageError, BundleError: as `tensorrt_device.open_engine`.
    """
    device, execution = open_engine(bundle)
    return TensorRtEngine(bundle, TensorRtGraph(bundle.manifest, device, execution, max_tokens))


@dataclass(frozen=True)
class EngineKernels:
    """What computes latent attention, in place of `Kernels`."""

    name: str = "TensorRT"
    library: None = None
    reason: str = "the engine brings its own"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class TensorRtEngine(BundleText):
    """A loaded bundle; attributes and methods as those of `Engine`."""

    def __init__(self, bundle: Bundle, graph: TensorRtGraph) -> None:
        self.bundle = bundle
        self.lock = threading.RLock()
        self._graph = graph
        self.cache = graph.cache
        self.capacity_tokens = graph.capacity
        self.kv_bytes_per_token = graph.bytes_per_token
        self.kernels = EngineKernels()

    def session(self) -> TensorRtSession:
        """An empty session; without the plugin a SessionError while another is open."""
        with self.lock:
            return TensorRtSession(self, self.cache.open())

    def generate(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: TensorRtSession | None = None,
    ) -> GenerationResult:
        """Continue a prompt. Arguments and errors: as `Engine.stream`."""
        generation = self.stream(prompt, options, session=session)
        for _ in generation:
            pass
        return generation.result

    def stream(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: TensorRtSession | None = None,
    ) -> TensorRtGeneration:
        """Continue a prompt, one event a token. Arguments and errors: as `Engine.stream`."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if session is not None:
            session.check_open()
        return TensorRtGeneration(
            self, self.check_ids(ids), options or GenerationOptions(), session
        )

    def check_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        """The ids as a list; UsageError unless they are token ids of this model."""
        vocab_size = self.bundle.manifest.model.vocab_size
        array = token_array(ids)
        if not len(array):
            raise UsageError("there are no tokens", hint="give at least one")
        outside = array[(array < 0) | (array >= vocab_size)]
        if len(outside):
            raise UsageError(
                "a token is not in the model's vocabulary",
                found=outside[0],
                allowed=f"0 to {vocab_size - 1}",
                hint="use the tokenizer of the bundle",
            )
        flat: list[int] = array.tolist()
        return flat

    def step(
        self,
        requests: Sequence[tuple[TensorRtSession, Sequence[int]]],
        *,
        all_logits: bool = False,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Logits]:
        """Append tokens to sessions, one after the other. Arguments, result and errors: as
        `Engine.step`."""
        if all_logits and positions is not None:
            raise UsageError("all_logits and positions exclude each other")
        if positions is not None and len(positions) != len(requests):
            raise UsageError(
                "every request needs its list of positions",
                found=len(positions),
                allowed=len(requests),
            )
        if len({id(session) for session, _ in requests}) < len(requests):
            raise UsageError("a session is given twice")
        with self.lock:
            several = [(session, self._check_request(session, ids)) for session, ids in requests]
            self._check_room(several)
            wanted = [
                _wanted(len(ids), all_logits, None if positions is None else positions[index])
                for index, (_, ids) in enumerate(several)
            ]
            results = []
            for (session, ids), at in zip(several, wanted, strict=True):
                order = sorted(set(at))
                rows = self._graph.append(session.place, ids, session.length, order)
                session.appended(ids)
                logits = rows[[order.index(one) for one in at]]
                results.append(logits if all_logits or positions is not None else logits[0])
            return results

    def _check_request(self, session: TensorRtSession, ids: Sequence[int]) -> list[int]:
        if session.engine is not self:
            raise UsageError("the session is of another engine")
        session.check_open()
        return self.check_ids(ids)

    def _check_room(self, requests: Sequence[tuple[TensorRtSession, list[int]]]) -> None:
        """Before the first of them changes."""
        for session, ids in requests:
            if len(ids) > session.room:
                raise SessionError(
                    "the cache is full, or the model's context too short",
                    found=f"{session.length} tokens in the session and {len(ids)} new ones",
                    allowed=f"{session.room} new ones",
                    hint="shorten the prompt, or rewind or close sessions",
                )
        needed = sum(self.cache.needed(s.place, s.length, len(ids)) for s, ids in requests)
        if needed > self.cache.free:
            raise SessionError(
                "the cache has no room for all of these sessions together",
                found=f"{needed} pages",
                allowed=f"{self.cache.free} pages",
                hint="give fewer sessions or tokens, or close sessions",
            )

    def close(self) -> None:
        """Free the GPU's memory."""
        self._graph.close()


def _wanted(count: int, all_logits: bool, positions: Sequence[int] | None) -> list[int]:
    """Which of the new tokens' logits."""
    if all_logits:
        return list(range(count))
    if positions is None:
        return [count - 1]
    if any(not 0 <= at < count for at in positions):
        raise UsageError(
            "a position is not among the new tokens",
            found=list(positions),
            allowed=f"0 to {count - 1}",
        )
    return list(positions)


class TensorRtSession(Closing):
    """A sequence in the cache; methods as those of `Session`."""

    def __init__(self, engine: TensorRtEngine, place: Place, tokens: Sequence[int] = ()) -> None:
        """Use `TensorRtEngine.session` or `fork`."""
        self.engine = engine
        self.place = place
        self._tokens = list(tokens)
        self._give_back = weakref.finalize(self, engine.cache.close, place)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return tuple(self._tokens)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._give_back.alive

    @property
    def room(self) -> int:
        """Tokens that can be added now."""
        context = self.engine.bundle.manifest.model.max_position_embeddings
        room = self.engine.cache.room(self.place, self.length)
        return max(0, min(context - self.length, room))

    @property
    def cache_bytes(self) -> int:
        """Bytes of this session's rows."""
        return int(self.length * self.engine.kv_bytes_per_token)

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        """Append tokens; the logits after the last one, or after each."""
        return self.engine.step([(self, ids)], all_logits=all_logits)[0]

    def decode(self, token_id: int) -> Logits:
        """Append one token; the logits after it, [vocab_size]."""
        return self.prefill([token_id])

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.check_open()
        if not 0 <= length <= self.length:
            raise SessionError(
                "a session cannot be rewound to there", found=length, allowed=f"0 to {self.length}"
            )
        with self.engine.lock:
            self.engine.cache.trim(self.place, length)
            del self._tokens[length:]

    def rewind_to_prefix(self, ids: Sequence[int]) -> int:
        """Forget what differs from `ids`; how many tokens of them stay."""
        same = 0
        for held, wanted in zip(self._tokens, ids, strict=False):
            if held != wanted:
                break
            same += 1
        self.rewind(same)
        return same

    def fill_by_copies(self, length: int) -> None:
        """Grow to `length` tokens without computing: the rows there are repeated. For measuring."""
        self.check_open()
        whole = self.length
        if length <= whole:
            return
        if not whole or length - whole > self.room:
            raise SessionError(
                "the cache cannot be filled", found=f"{length} tokens", allowed=f"1 to {self.room}"
            )
        with self.engine.lock:
            self.engine.cache.repeat(self.place, whole, length)
            self._tokens = (self._tokens * -(-length // whole))[:length]

    def fork(self) -> TensorRtSession:
        """Another session with the same tokens; takes no memory until one of them goes on.

        Raises:
            SessionError: the session is closed, or the engine has no plugin.
        """
        self.check_open()
        with self.engine.lock:
            return TensorRtSession(self.engine, self.engine.cache.fork(self.place), self._tokens)

    def close(self) -> None:
        """Give the cache back. Closing again does nothing."""
        with self.engine.lock:
            self._give_back()
            self._tokens.clear()

    def check_open(self) -> None:
        """Raise a SessionError if the session is closed."""
        if self.closed:
            raise SessionError("the session is closed", hint="make another with Engine.session()")

    def appended(self, ids: Sequence[int]) -> None:
        """For the engine: note tokens whose cache was written."""
        self._tokens += ids
