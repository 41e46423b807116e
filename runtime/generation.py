"""The loop that makes text: the engine makes the tokens, here they become text and events."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from mla_deploy.runtime import _runtime
from mla_deploy.runtime.cancellation import Cancellation
from mla_deploy.runtime.closing import Closing
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.statistics import Statistics
from mla_deploy.runtime.writing import Event, FinishReason, Writing

if TYPE_CHECKING:
    from mla_deploy.runtime.engine import Engine
    from mla_deploy.runtime.session import Session


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


class TokenSource(Protocol):
    """Makes the tokens of a generation; `_runtime.Generation` is one."""

    def next(
        self, cancellation: _runtime.Cancellation | None = None
    ) -> tuple[int, Literal["eos", "length", "context"] | None] | None:
        """Make a token, the first one after computing the prompt; the token, and why it is the
        last one if it is. None: it was cancelled."""

    def result(self) -> tuple[int, float, float, int]:
        """So far: tokens of the prompt found in the cache, milliseconds of prefill and of decoding,
        bytes of the session's pages."""


class Generation(Closing, Iterator[Event]):
    """A generation under way: an iterator of events, made by `Engine.stream`.

    To leave early, stop asking for events: `close`, the end of a `with`, or dropping the object
    frees a session of its own.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        options: GenerationOptions,
        session: Session | None,
        cancellation: Cancellation | None,
    ) -> None:
        self._loop = _Loop(engine, prompt, options, session or engine.session())
        # The events know the loop but not this object: no cycle delays freeing the session.
        self._events = self._loop.events(session, cancellation)

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Make no more tokens."""
        self._events.close()

    @property
    def result(self) -> GenerationResult:
        """What was made so far."""
        return self._loop.result()


class _Loop:
    """The state of a generation, and the loop over its tokens."""

    def __init__(
        self, engine: Engine, prompt: list[int], options: GenerationOptions, session: Session
    ) -> None:
        self._source: TokenSource | None = engine.token_source(session, prompt, options)
        self._took = self._source.result()
        self._prompt_tokens = len(prompt)
        self._writing = Writing(engine, options.stop)
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._text_seconds = 0.0
        self._finish_reason: FinishReason | None = None

    def result(self) -> GenerationResult:
        took = self._took if self._source is None else self._source.result()
        reused, prefill_ms, decode_ms, cache_bytes = took
        statistics = Statistics(
            prompt_tokens=self._prompt_tokens,
            reused_tokens=reused,
            generated_tokens=len(self._tokens),
            prefill_seconds=prefill_ms / 1000,
            decode_seconds=decode_ms / 1000 + self._text_seconds,
            cache_bytes=cache_bytes,
        )
        return GenerationResult(
            tuple(self._tokens), "".join(self._text), self._finish_reason, statistics
        )

    def events(
        self, session: Session | None, cancellation: Cancellation | None
    ) -> Generator[Event, None, None]:
        """session: the caller's, if it is one."""
        source = self._source
        assert source is not None
        flag = None if cancellation is None else cancellation.core
        try:
            while self._finish_reason is None:
                if session is not None:
                    session.check_open()  # it may have been closed meanwhile
                made = source.next(flag)
                if made is None:
                    self._finish_reason = "cancelled"
                    return
                start = time.perf_counter()
                event = self._event(*made)
                self._text_seconds += time.perf_counter() - start
                yield event
        finally:
            self._took = source.result()
            self._source = None  # and with it the session, if nobody else has it

    def _event(self, token: int, reason: FinishReason | None) -> Event:
        self._tokens.append(token)
        event = self._writing.event(token, reason)
        self._finish_reason = event.finish_reason
        self._text.append(event.text)
        return event
