"""Figures of a generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """What a generation took.

    Attributes:
        prompt_tokens: of the whole prompt.
        reused_tokens: of these, found in the session's cache.
        generated_tokens: sampled, the last one included.
        prefill_seconds: from the prompt to the first logits.
        decode_seconds: sampling, text and decode steps, without the time between events.
        cache_bytes: of the session's pages, scales and zeros and the unused rest of the last page
            included.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Tokens of the prompt that were computed, by the time they took."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Decode steps by time; the first token comes with the prefill. None: there was no step."""
        return _rate(self.generated_tokens - 1, self.decode_seconds)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None
