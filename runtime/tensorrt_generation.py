"""Making text with a TensorRT engine: prefill, then sample, show and decode token after token."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from mla_deploy.runtime.closing import Closing
from mla_deploy.runtime.generation import GenerationResult
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.sampling import Sampler
from mla_deploy.runtime.statistics import Statistics
from mla_deploy.runtime.writing import Event, FinishReason, Writing

if TYPE_CHECKING:
    from mla_deploy.runtime.tensorrt import TensorRtEngine, TensorRtSession


class TensorRtGeneration(Closing, Iterator[Event]):
    """A generation under way; methods as those of `Generation`."""

    def __init__(
        self,
        engine: TensorRtEngine,
        prompt: list[int],
        options: GenerationOptions,
        session: TensorRtSession | None,
    ) -> None:
        self._engine, self._prompt, self._options = engine, prompt, options
        self._writing = Writing(engine, options.stop)
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._finish_reason: FinishReason | None = None
        self._reused = self._cache_bytes = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._events = self._run(session)

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Make no more tokens."""
        self._events.close()

    @property
    def result(self) -> GenerationResult:
        """What was made so far."""
        statistics = Statistics(
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            generated_tokens=len(self._tokens),
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            cache_bytes=self._cache_bytes,
        )
        return GenerationResult(
            tuple(self._tokens), "".join(self._text), self._finish_reason, statistics
        )

    def _run(self, given: TensorRtSession | None) -> Generator[Event, None, None]:
        session = given or self._engine.session()
        try:
            start = time.perf_counter()
            # The last token is computed again if need be: its logits are wanted.
            self._reused = session.rewind_to_prefix(self._prompt[:-1])
            logits = session.prefill(self._prompt[self._reused :])
            self._prefill_seconds = time.perf_counter() - start
            sampler = Sampler(self._options, len(logits))
            sampler.observe(self._prompt)
            while self._finish_reason is None:
                start = time.perf_counter()
                if self._tokens:
                    logits = session.decode(self._tokens[-1])
                token = sampler.pick(logits)
                sampler.observe([token])
                self._tokens.append(token)
                event = self._event(token, session.room)
                self._cache_bytes = session.cache_bytes
                self._decode_seconds += time.perf_counter() - start
                yield event
        finally:
            if given is None:
                session.close()

    def _event(self, token: int, room: int) -> Event:
        reason: FinishReason | None = None
        if token in self._engine.eos_token_ids:
            reason = "eos"
        elif len(self._tokens) == self._options.max_tokens:
            reason = "length"
        elif room < 1:
            reason = "context"
        event = self._writing.event(token, reason)
        self._finish_reason = event.finish_reason
        self._text.append(event.text)
        return event
