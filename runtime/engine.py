"""A model in memory: the graph, the cache that its sessions share, and the tokenizer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import Bundle
from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime.arena import SCRATCH_PAGE, ArenaFullError, PageArena, PageTable
from mla_deploy.runtime.generation import Generation, GenerationResult
from mla_deploy.runtime.graph import DecoderGraph, Integers, Logits
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.session import Session
from mla_deploy.tokenizer import TOKENIZER, Tokenizer

PREFILL_CHUNK = 512


def load(
    bundle: Path | str,
    *,
    max_tokens: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    threads: int | None = None,
    spin: bool = True,
    kernels: str = "auto",
    verify: bool = False,
) -> Engine:
    """Load a bundle.

    Args:
        bundle: the folder.
        max_tokens: the cache holds so many tokens of all sessions together, rounded up to whole
            pages; None: one session of the model's full context. Memory is taken as it is used.
        prefill_chunk: new tokens that go through the graph at once; bounds the memory of a prefill.
        threads: that compute; None: one a physical core.
        spin: waiting threads poll for a moment before they sleep: faster, and costs power.
        kernels: of latent attention. "native": our operator library; "stock": what onnxruntime has;
            "auto": native where it can be had. `Engine.kernels` says what it became, and why.
        verify: check the sha256 of large files too.

    Raises:
        BundleError: the folder is no bundle, or is damaged.
        UsageError: an option outside its range, onnxruntime is not installed, or kernels are asked
            for that this installation does not have.
    """
    for name, value in (
        ("max_tokens", max_tokens),
        ("prefill_chunk", prefill_chunk),
        ("threads", threads),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is out of range", found=value, allowed="1 or more")
    opened = Bundle.open(bundle, verify=verify)
    if opened.manifest.tensorrt is not None:
        return _load_tensorrt(opened, max_tokens, threads=threads, kernels=kernels)
    graph = DecoderGraph(opened, threads=threads, spin=spin, kernels=kernels)
    if max_tokens is None:
        max_tokens = opened.manifest.model.max_position_embeddings
    return Engine(opened, graph, PageArena(opened.manifest.cache, max_tokens), prefill_chunk)


def _load_tensorrt(
    bundle: Bundle, max_tokens: int | None, *, threads: int | None, kernels: str
) -> Engine:
    if threads is not None or kernels != "auto":
        raise UsageError(
            "threads and kernels are for bundles that run on the CPU",
            found=f"threads {threads}, kernels {kernels}",
            hint="leave them out: TensorRT runs on the GPU with kernels of its own",
        )
    from mla_deploy.runtime.tensorrt import load_tensorrt

    # Not the class, but its methods.
    return cast("Engine", load_tensorrt(bundle, max_tokens))


class Engine:
    """A loaded bundle. Made by `load`.

    Sessions may be used from several threads; the graph runs one step at a time.

    Attributes:
        bundle: what was loaded.
        capacity_tokens: tokens that the cache holds, of all sessions together.
        kv_bytes_per_token: bytes of cache for one token in all layers, scales and zeros included,
            counted on the arrays themselves.
        kernels: what computes latent attention.
    """

    def __init__(
        self, bundle: Bundle, graph: DecoderGraph, arena: PageArena, prefill_chunk: int
    ) -> None:
        self.bundle = bundle
        self.lock = threading.RLock()
        self._graph = graph
        self._arena = arena
        self._prefill_chunk = prefill_chunk
        self.capacity_tokens = arena.capacity_tokens
        self.kv_bytes_per_token = arena.page_bytes / arena.page_tokens
        self.kernels = graph.kernels
        graph.bind_cache(arena.arrays)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            TokenizerError: the bundle has none, or it is broken.
        """
        return Tokenizer.open(self.bundle)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle brings a tokenizer; without one, prompts are token ids."""
        return self.bundle.has(TOKENIZER)

    @functools.cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the manifest and by the tokenizer."""
        ids = frozenset(self.bundle.manifest.model.eos_token_ids)
        return ids.union(self.tokenizer.eos_token_ids) if self.has_tokenizer else ids

    def session(self) -> Session:
        """An empty session."""
        return Session(self, PageTable(self._arena))

    def generate(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
    ) -> GenerationResult:
        """Continue a prompt. Arguments and errors: as `stream`."""
        generation = self.stream(prompt, options, session=session)
        for _ in generation:
            pass
        return generation.result

    def stream(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
    ) -> Generation:
        """Continue a prompt, one event a token.

        Args:
            prompt: text, or token ids.
            options: None: greedy, 256 tokens.
            session: its cache is used again for as much of the prompt as it holds already, and the
                rest is forgotten; afterwards it holds the prompt and all new tokens but the last.
                None: a session of its own.

        Raises:
            UsageError: the prompt is empty, or holds ids that the model does not have.
            SessionError: the prompt does not fit into the cache or the model's context.
            TokenizerError: text is wanted of a bundle without a tokenizer.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Generation(self, self.check_ids(ids), options or GenerationOptions(), session)

    def check_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        """The ids as a list.

        Raises:
            UsageError: there are none, or they are not token ids of this model.
        """
        vocab_size = self.bundle.manifest.model.vocab_size
        if not len(ids):
            raise UsageError("there are no tokens", hint="give at least one")
        try:
            array = np.asarray(ids)
        except (ValueError, OverflowError):  # lists of lists of unequal lengths
            array = np.empty((0, 0))
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise UsageError(
                "tokens must be a flat list of integers", found=repr(ids)[:80], allowed="token ids"
            )
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
        requests: Sequence[tuple[Session, Sequence[int]]],
        *,
        all_logits: bool = False,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Logits]:
        """Append tokens to several sessions at once, as many to each as it is given.

        Args:
            requests: sessions, each at most once, and their new tokens.
            all_logits: give the logits after every new token.
            positions: give them after these, counted in the new tokens of each request.

        Returns:
            For each request the logits after its last token, [vocab_size]; with all_logits or
            positions [number of positions, vocab_size].

        Raises:
            UsageError: tokens or positions out of range, a session twice or of another engine.
            SessionError: a session is closed, or the tokens do not fit into the model's context or
                the cache. Then no session has changed.
        """
        with self.lock:
            feeds = [self._feed(session, ids) for session, ids in requests]
            if len({id(feed.session) for feed in feeds}) < len(feeds):
                raise UsageError("a session can be only once in a step", hint="fork it")
            if all_logits and positions is not None:
                raise UsageError("all_logits and positions exclude each other")
            if all_logits:
                wanted = [list(range(len(feed.ids))) for feed in feeds]
            elif positions is None:
                wanted = [[len(feed.ids) - 1] for feed in feeds]
            else:
                wanted = _check_positions(positions, feeds)
            try:
                self._reserve(feeds)
                results = self._run(feeds, wanted)
            except BaseException:  # also when the user interrupts
                for feed in feeds:
                    feed.session.rewind(feed.past)
                raise
            if all_logits or positions is not None:
                return results
            return [logits[0] for logits in results]

    def _feed(self, session: Session, ids: Sequence[int]) -> _Feed:
        session.check_open()
        if session.engine is not self:
            raise UsageError("a session belongs to the engine that made it")
        checked = self.check_ids(ids)
        limit = self.bundle.manifest.model.max_position_embeddings
        if session.length + len(checked) > limit:
            raise SessionError(
                "the model's context is too short",
                found=f"{session.length} tokens in the session and {len(checked)} new ones",
                allowed=f"{limit} together",
                hint="shorten the prompt, or rewind the session",
            )
        return _Feed(session, checked, session.length)

    def _reserve(self, feeds: Sequence[_Feed]) -> None:
        try:
            for feed in feeds:
                feed.session.pages.reserve(feed.past, feed.past + len(feed.ids))
        except ArenaFullError:
            for feed in feeds:
                feed.session.pages.truncate(feed.past)
            free = self._arena.free_pages * self._arena.page_tokens
            raise SessionError(
                "the cache is full",
                found=f"{sum(len(feed.ids) for feed in feeds)} new tokens",
                allowed=f"{feeds[0].session.room} for this session"
                if len(feeds) == 1
                else f"{free} in free pages, besides what the sessions' last pages hold",
                hint=f"load the bundle with max_tokens above {self.capacity_tokens}, or close or "
                "rewind a session",
            ) from None

    def _run(self, feeds: Sequence[_Feed], wanted: Sequence[Sequence[int]]) -> list[Logits]:
        """Run the graph chunk by chunk. Logits [len(wanted[i]), vocab_size] for each feed."""
        vocab_size = self.bundle.manifest.model.vocab_size
        results = [np.empty((len(rows), vocab_size), dtype=np.float32) for rows in wanted]
        active = list(range(len(feeds)))
        done = 0
        while active:
            # At most prefill_chunk tokens at once, whatever the number of sessions.
            size = max(1, self._prefill_chunk // len(active))
            chunk = [
                _Feed(f.session, f.ids[done : done + size], f.past + done)
                for f in (feeds[i] for i in active)
            ]
            rows = [
                [(row, at - done) for row, at in enumerate(wanted[i]) if done <= at < done + size]
                for i in active
            ]
            logits = self._graph.run(_feeds(chunk, [[at for _, at in row] for row in rows]))
            for b, i in enumerate(active):
                for column, (row, _) in enumerate(rows[b]):
                    results[i][row] = logits[b, column]
                chunk[b].session.appended(chunk[b].ids)
            done += size
            active = [i for i in active if done < len(feeds[i].ids)]
        return results


@dataclass(frozen=True)
class _Feed:
    """New tokens of one session, after `past` tokens in its cache."""

    session: Session
    ids: list[int]
    past: int


def _feeds(chunk: Sequence[_Feed], logits_at: Sequence[Sequence[int]]) -> dict[str, Integers]:
    """The graph's inputs but for the cache. Shapes: `mla_deploy.bundle`."""
    pages = [feed.session.pages.pages for feed in chunk]
    return {
        "input_ids": _padded([feed.ids for feed in chunk], 0),
        "past_lengths": np.array([feed.past for feed in chunk], dtype=np.int64),
        "new_lengths": np.array([len(feed.ids) for feed in chunk], dtype=np.int64),
        "block_table": _padded(pages, SCRATCH_PAGE),
        "logit_index": _padded(logits_at, 0),
    }


def _padded(rows: Sequence[Sequence[int]], value: int) -> Integers:
    """The rows side by side, filled up on the right to the longest one; at least one column."""
    table = np.full((len(rows), max(1, *map(len, rows))), value, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _check_positions(positions: Sequence[Sequence[int]], feeds: Sequence[_Feed]) -> list[list[int]]:
    if len(positions) != len(feeds):
        raise UsageError(
            "every request needs its list of positions", found=len(positions), allowed=len(feeds)
        )
    for at, feed in zip(positions, feeds, strict=True):
        outside = [position for position in at if not 0 <= position < len(feed.ids)]
        if outside:
            raise UsageError(
                "a position is not among the new tokens",
                found=outside[0],
                allowed=f"0 to {len(feed.ids) - 1}",
            )
    return [list(at) for at in positions]
