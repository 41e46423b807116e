"""The engine of C and C++ programs, `csrc/core/`, from Python: ONNX Runtime computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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


class CoreEngine(Engine):
    """Sessions compute together, and callers get their turns in order."""

    batches = True
    saves_sessions = True

    def __init__(self, bundle: Bundle, core: _runtime.Engine, kernels: Kernels) -> None:
        """Use `load`."""
        self.bundle = bundle
        self.kernels = kernels
        self.capacity_tokens = core.capacity_tokens
        self.kv_bytes_per_token = core.bytes_per_token
        self._core = core
        self._vocab_size = bundle.manifest.model.vocab_size

    @property
    def free_tokens(self) -> int:
        return self._core.free_tokens

    def session(self) -> Session:
        return CoreSession(self, self._core.session())

    def load_session(self, path: Path | str) -> Session:
        return CoreSession(self, self._core.load_session(os.fsencode(path)))

    def check_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        array = token_array(ids)
        self._core.check_tokens(array)
        flat: list[int] = array.tolist()
        return flat

    def token_source(
        self, session: Session, prompt: list[int], options: GenerationOptions
    ) -> TokenSource:
        return _runtime.Generation(
            _core(session),
            token_array(prompt),
            options.sampling(),
            sorted(self.eos_token_ids),
            options.max_tokens,
        )

    def append(
        self, requests: Sequence[Request], cancellation: _runtime.Cancellation | None
    ) -> list[Logits]:
        results = [
            np.empty((len(wanted), self._vocab_size), dtype=np.float32) for *_, wanted in requests
        ]
        given = [
            (_core(session), ids, wanted, logits)
            for (session, ids, wanted), logits in zip(requests, results, strict=True)
        ]
        self._core.step(given, cancellation)
        return results


class CoreSession(Session):
    """A session in C++."""

    def __init__(self, engine: CoreEngine, core: _runtime.Session) -> None:
        """Use `Engine.session` or `fork`."""
        self.engine = engine
        self._core: _runtime.Session | None = core

    @property
    def core(self) -> _runtime.Session:
        """The session in C++.

        Raises:
            SessionError: the session is closed.
        """
        core = self._core
        if core is None:
            raise SessionError("the session is closed", hint="make another with Engine.session()")
        return core

    def check_open(self) -> None:
        self.core  # noqa: B018 - raises

    @property
    def length(self) -> int:
        return 0 if self.closed else self.core.length

    @property
    def tokens(self) -> tuple[int, ...]:
        return () if self.closed else tuple(self.core.tokens())

    @property
    def closed(self) -> bool:
        return self._core is None

    @property
    def room(self) -> int:
        return 0 if self.closed else self.core.room

    @property
    def cache_bytes(self) -> int:
        return 0 if self.closed else self.core.cache_bytes

    def rewind(self, length: int) -> None:
        self.core.rewind(length)

    def common_prefix(self, ids: Sequence[int] | Integers) -> int:
        return self.core.common_prefix(token_array(ids))

    def fill_by_copies(self, length: int) -> None:
        self.core.fill_by_copies(length)

    def fork(self) -> Session:
        assert isinstance(self.engine, CoreEngine)
        return CoreSession(self.engine, self.core.fork())

    def save(self, path: Path | str) -> None:
        self.core.save(os.fsencode(path))

    def close(self) -> None:
        """Give the memory back, once calls in other threads have ended. May be called again."""
        self._core = None


def _core(session: Session) -> _runtime.Session:
    if not isinstance(session, CoreSession):
        raise UsageError("the session is of another engine", hint="use one of this engine")
    return session.core
