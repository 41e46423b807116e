"""From tokens to what is shown of them: text that is whole, up to a stop string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mla_deploy.runtime.bundle_text import BundleText
from mla_deploy.runtime.stopping import StopStrings

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]
"""`eos`: the model ended the text. `stop`: a stop string came. `length`: max_tokens were made.
`context`: the model's context or the cache has no room for another token. `cancelled`: by a
`Cancellation`; it has no event, as no token comes with it."""


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


class Writing:
    """The text of one sequence, as its tokens come."""

    def __init__(self, engine: BundleText, stop: tuple[str, ...]) -> None:
        """A bundle without a tokenizer has no text, and no stop strings (TokenizerError)."""
        needs_text = engine.has_tokenizer or stop
        self._decoder = engine.tokenizer.stream() if needs_text else None
        self._stops = StopStrings(stop)

    def event(self, token: int, reason: FinishReason | None) -> Event:
        """The event of a token; `reason`: why it is the last, apart from stop strings."""
        text = ""
        if self._decoder is not None and reason != "eos":
            text = self._stops.push(self._decoder.push(token))
            if self._stops.stopped:
                reason = "stop"
        if reason is not None:
            text += self.finish()
            if self._stops.stopped:  # perhaps by the replacement of half a character
                reason = "stop"
        return Event(token, text, reason)

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        if self._decoder is None:
            return ""
        return self._stops.push(self._decoder.finish()) + self._stops.finish()
