"""The loop that makes text: prefill, then sample, show and decode one token after another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.sampling import Sampler
from mla_deploy.runtime.statistics import Statistics
from mla_deploy.runtime.stopping import StopStrings

if TYPE_CHECKING:
    from mla_deploy.runtime.engine import Engine
    from mla_deploy.runtime.session import Session

FinishReason = Literal["eos", "stop", "length", "context"]
"""`eos`: the model ended the text. `stop`: a stop string came. `length`: max_tokens were made.
`context`: the model's context or the cache has no room for another token."""


@dataclass(frozen=True)
class Event:
    """One more token.

    Attributes:
        token: its id.
        text: what can be shown since the event before. Empty while a character is incomplete or a
            stop string may have begun; the texts of all events together are the result's.
        finish_reason: with the last event, why it is the last.
    """

    token: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class GenerationResult:
    """What came of a prompt.

    Attributes:
        tokens: all that were sampled, with the one that ended the text and those of a stop string.
        text: theirs, without end token and stop string; empty if the bundle has no tokenizer.
        finish_reason: None: the caller left before the end.
        statistics: what it took.
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    statistics: Statistics


class Generation(Iterator[Event]):
    """A generation under way: an iterator of events, made by `Engine.stream`.

    To leave early, stop asking for events: `close`, the end of a `with`, or dropping the object
    frees a session of its own.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        options: GenerationOptions,
        session: Session | None,
    ) -> None:
        if session is not None:
            session.check_open()
        self._loop = _Loop(engine, prompt, options)
        # The events know the loop but not this object: no cycle delays freeing the session.
        self._events = self._loop.events(session)

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Make no more tokens."""
        self._events.close()

    @property
    def result(self) -> GenerationResult:
        """What was made so far."""
        return self._loop.result()


class _Loop:
    """The state of a generation, and the loop over its tokens."""

    def __init__(self, engine: Engine, prompt: Sequence[int], options: GenerationOptions) -> None:
        self._engine = engine
        self._prompt = list(prompt)
        self._options = options
        needs_text = engine.has_tokenizer or options.stop
        self._decoder = engine.tokenizer.stream() if needs_text else None
        self._stops = StopStrings(options.stop)
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._finish_reason: FinishReason | None = None
        self._reused = 0
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0
        self._cache_bytes = 0

    def result(self) -> GenerationResult:
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

    def events(self, session: Session | None) -> Generator[Event, None, None]:
        with contextlib.ExitStack() as stack:
            if session is None:
                session = stack.enter_context(self._engine.session())
            yield from self._generate(session)

    def _generate(self, session: Session) -> Iterator[Event]:
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

    def _event(self, token: int, room: int) -> Event:
        is_eos = token in self._engine.eos_token_ids
        text = ""
        if self._decoder is not None and not is_eos:
            text = self._stops.push(self._decoder.push(token))
        if is_eos:
            self._finish_reason = "eos"
        elif self._stops.stopped:
            self._finish_reason = "stop"
        elif len(self._tokens) == self._options.max_tokens:
            self._finish_reason = "length"
        elif room < 1:
            self._finish_reason = "context"
        if self._decoder is not None and self._finish_reason is not None:
            text += self._stops.push(self._decoder.finish()) + self._stops.finish()
            if self._stops.stopped:  # perhaps by the replacement of half a character
                self._finish_reason = "stop"
        self._text.append(text)
        return Event(token, text, self._finish_reason)
