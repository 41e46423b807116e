"""The tokens of a generation with a TensorRT engine: prefill, then sample and decode."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np

from mla_deploy.runtime import _runtime
from mla_deploy.runtime.cancellation import CancelledError
from mla_deploy.runtime.native import Logits, token_array
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.sampling import Sampler
from mla_deploy.runtime.session import Session


class TensorRtTokens:
    """`TokenSource` by the session's own calls."""

    def __init__(self, session: Session, prompt: list[int], options: GenerationOptions) -> None:
        self._session, self._prompt, self._options = session, prompt, options
        self._sampler: Sampler | None = None
        self._last: int | None = None
        self._made = self._reused = self._cache_bytes = 0
        self._prefill_ms = self._decode_ms = 0.0

    def next(
        self, cancellation: _runtime.Cancellation | None = None
    ) -> tuple[int, Literal["eos", "length", "context"] | None] | None:
        start = time.perf_counter()
        try:
            logits = self._logits(cancellation)
        except CancelledError:
            return None
        if self._sampler is None:
            self._sampler = Sampler(self._options, len(logits))
            self._sampler.observe(self._prompt)
            self._prefill_ms = 1000 * (time.perf_counter() - start)
            start = time.perf_counter()
        token = self._last = self._sampler.pick(logits)
        self._sampler.observe([token])
        self._made += 1
        self._cache_bytes = self._session.cache_bytes
        self._decode_ms += 1000 * (time.perf_counter() - start)
        return token, self._reason(token)

    def result(self) -> tuple[int, float, float, int]:
        return self._reused, self._prefill_ms, self._decode_ms, self._cache_bytes

    def _logits(self, cancellation: _runtime.Cancellation | None) -> Logits:
        """After the prompt, or after the token before."""
        if self._last is not None:
            ids = [self._last]
        else:
            # The last token is computed again if need be: its logits are wanted.
            self._reused = self._session.rewind_to_prefix(self._prompt[:-1])
            ids = self._prompt[self._reused :]
        wanted = np.array([len(ids) - 1])
        request = (self._session, token_array(ids), wanted)
        return self._session.engine.append([request], cancellation)[0][0]

    def _reason(self, token: int) -> Literal["eos", "length", "context"] | None:
        if token in self._session.engine.eos_token_ids:
            return "eos"
        if self._made == self._options.max_tokens:
            return "length"
        return "context" if self._session.room < 1 else None
