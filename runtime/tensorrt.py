"""Running a bundle of TensorRT engines: `Engine` and `Session` over `tensorrt_graph.py`.

An engine computes one sequence at a time. With the plugin the cache is of pages, and there may be
several sessions and forks; a step for several computes one after the other. Without it there is one
session. Sessions are not kept in files.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import Bundle
from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.engine import Engine, Request
from mla_deploy.runtime.generation import TokenSource
from mla_deploy.runtime.native import Integers, Logits, token_array
from mla_deploy.runtime.ops import Kernels
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.session import Session
from mla_deploy.runtime.tensorrt_cache import Place
from mla_deploy.runtime.tensorrt_device import open_engine
from mla_deploy.runtime.tensorrt_graph import TensorRtGraph
from mla_deploy.runtime.tensorrt_tokens import TensorRtTokens


def load_tensorrt(bundle: Bundle, max_tokens: int | None) -> TensorRtEngine:
    """Load a bundle that was opened.

    Raises:
        UsageError, BundleError: as `tensorrt_device.open_engine`.
    """
    device, execution = open_engine(bundle)
    return TensorRtEngine(bundle, TensorRtGraph(bundle.manifest, device, execution, max_tokens))


class EngineKernels(Kernels):
    """What computes latent attention in an engine."""

    @property
    def name(self) -> Literal["TensorRT"]:
        return "TensorRT"


class TensorRtEngine(Engine):
    """A step for several sessions computes one after the other."""

    batches = False
    saves_sessions = False

    def __init__(self, bundle: Bundle, graph: TensorRtGraph) -> None:
        self.bundle = bundle
        self.lock = threading.RLock()
        self._graph = graph
        self.cache = graph.cache
        self.capacity_tokens = graph.capacity
        self.kv_bytes_per_token = graph.bytes_per_token
        self.kernels = EngineKernels(None, "the engine brings its own")

    @property
    def free_tokens(self) -> int:
        return self.cache.free_tokens

    def session(self) -> TensorRtSession:
        with self.lock:
            return TensorRtSession(self, self.cache.open())

    def load_session(self, path: Path | str) -> Session:
        raise _no_files(path)

    def check_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
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

    def token_source(
        self, session: Session, prompt: list[int], options: GenerationOptions
    ) -> TokenSource:
        self._own(session)
        return TensorRtTokens(session, prompt, options)

    def append(
        self, requests: Sequence[Request], cancellation: _runtime.Cancellation | None
    ) -> list[Logits]:
        if len({id(session) for session, *_ in requests}) < len(requests):
            raise UsageError("a session is given twice", hint="give each its tokens in one request")
        with self.lock:
            several = [(self._own(session), self.check_ids(ids)) for session, ids, _ in requests]
            self._check_room(several)
            for (_, ids), (*_, wanted) in zip(several, requests, strict=True):
                _check_positions(wanted, len(ids))
            lengths = [session.length for session, _ in several]
            results = []
            try:
                for (session, ids), (*_, wanted) in zip(several, requests, strict=True):
                    order, at = np.unique(wanted, return_inverse=True)
                    rows = self._graph.append(
                        session.place, ids, session.length, order.tolist(), cancellation
                    )
                    session.appended(ids)
                    results.append(rows[at])
            except BaseException:
                for (session, _), length in zip(several, lengths, strict=True):
                    session.rewind(length)
                raise
            return results

    def _own(self, session: Session) -> TensorRtSession:
        if not isinstance(session, TensorRtSession) or session.engine is not self:
            raise UsageError("the session is of another engine", hint="use one of this engine")
        session.check_open()
        return session

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


def _check_positions(wanted: Integers, count: int) -> None:
    outside = wanted[(wanted < 0) | (wanted >= count)]
    if len(outside):
        raise UsageError(
            "a position is not among the new tokens",
            found=outside[0],
            allowed=f"0 to {count - 1}",
        )


def _no_files(path: Path | str) -> SessionError:
    return SessionError(
        "the sessions of TensorRT's engines are not kept in files",
        found=path,
        allowed="bundles that run on ONNX Runtime",
        hint="keep the tokens, and compute them again",
    )


class TensorRtSession(Session):
    """A place in the cache, and the tokens that are there."""

    def __init__(self, engine: TensorRtEngine, place: Place, tokens: Sequence[int] = ()) -> None:
        """Use `TensorRtEngine.session` or `fork`."""
        self.engine: TensorRtEngine = engine
        self.place = place
        self._tokens = list(tokens)
        self._give_back = weakref.finalize(self, engine.cache.close, place)

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self._tokens)

    @property
    def closed(self) -> bool:
        return not self._give_back.alive

    @property
    def room(self) -> int:
        context = self.engine.bundle.manifest.model.max_position_embeddings
        room = self.engine.cache.room(self.place, self.length)
        return max(0, min(context - self.length, room))

    @property
    def cache_bytes(self) -> int:
        return int(self.length * self.engine.kv_bytes_per_token)

    def rewind(self, length: int) -> None:
        self.check_open()
        if not 0 <= length <= self.length:
            raise SessionError(
                "a session cannot be rewound to there", found=length, allowed=f"0 to {self.length}"
            )
        with self.engine.lock:
            self.engine.cache.trim(self.place, length)
            del self._tokens[length:]

    def common_prefix(self, ids: Sequence[int] | Integers) -> int:
        self.check_open()
        wanted = token_array(ids)[: self.length]
        differs = np.flatnonzero(wanted != token_array(self._tokens[: len(wanted)]))
        return int(differs[0]) if len(differs) else len(wanted)

    def fill_by_copies(self, length: int) -> None:
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
        self.check_open()
        with self.engine.lock:
            return TensorRtSession(self.engine, self.engine.cache.fork(self.place), self._tokens)

    def save(self, path: Path | str) -> None:
        self.check_open()
        raise _no_files(path)

    def close(self) -> None:
        """Give the cache back. Closing again does nothing."""
        with self.engine.lock:
            self._give_back()
            self._tokens.clear()

    def check_open(self) -> None:
        if self.closed:
            raise SessionError("the session is closed", hint="make another with Engine.session()")

    def appended(self, ids: Sequence[int]) -> None:
        """For the engine: note tokens whose cache was written."""
        self._tokens += ids
