"""What a user chooses about a generation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mla_deploy.errors import UsageError


@dataclass(frozen=True)
class GenerationOptions:
    """How to go on from a prompt. The order in which the choices apply: `sampling.py`.

    Attributes:
        max_tokens: generate at most so many.
        temperature: divides the logits; 0 takes the most likely token always (greedy).
        top_k: sample among the k most likely tokens; 0: among all.
        top_p: sample among the most likely tokens that have this probability together; 1: all.
        min_p: leave out tokens less likely than this times the most likely one; 0: none.
        repetition_penalty: makes tokens that occurred, in the prompt too, less likely (Keskar et
            al., 2019); 1: off, below 1: more likely.
        seed: the same seed, bundle and machine give the same tokens; None: another every time.
        stop: end before any of these strings appears in the text.

    Raises:
        UsageError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        _check_number("temperature", self.temperature, 0, math.inf)
        _check_number("top_p", self.top_p, 0, 1, above=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True)
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise UsageError(
                "stop is out of range",
                found=repr(self.stop),
                allowed="a tuple of non-empty strings",
            )


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is out of range", found=value, allowed=f"an integer >= {least}")


def _check_number(
    name: str, value: object, least: float, most: float, *, above: bool = False
) -> None:
    if (
        not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not least <= value <= most
        or (above and value == least)
    ):
        allowed = f"{'above' if above else 'at least'} {least}"
        raise UsageError(
            f"{name} is out of range",
            found=value,
            allowed=allowed if most == math.inf else f"{allowed}, at most {most}",
        )
