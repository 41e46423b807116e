"""What a user chooses about a generation."""

from __future__ import annotations

from dataclasses import dataclass

from mla_deploy.errors import UsageError
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.native import require_engine

MOST = (1 << 32) - 1
"""Of tokens to generate, and of those to sample among."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to go on from a prompt.

    The choices apply in the order of transformers, so that the same options mean the same: penalty,
    temperature, top-k, top-p, min-p; `csrc/core/sampling.h` defines them.

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
        _check_integer("max_tokens", self.max_tokens, 1, MOST)
        _check_integer("top_k", self.top_k, 0, MOST)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, (1 << 64) - 1)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise UsageError(f"{name} is out of range", found=repr(value), allowed="a number")
        self.sampling()
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if not isinstance(self.stop, tuple) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise UsageError(
                "stop is out of range",
                found=repr(self.stop),
                allowed="a list or tuple of non-empty strings",
            )

    def sampling(self) -> _runtime.SamplingOptions:
        """The part of it that the sampler knows; checks the ranges of the numbers."""
        require_engine()
        return _runtime.SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise UsageError(
            f"{name} is out of range", found=value, allowed=f"an integer, {least} to {most}"
        )
