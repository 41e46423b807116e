"""The solver: codes, scales and zeros of groups of weights.

HQQ (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog/) takes the scale from the range
of a group and finds its zero by half-quadratic splitting: round the codes, shrink the errors toward
an l_p norm, refit the zero, twenty times. With its published constants (p 0.7, beta 10, kappa 1.01)
the shrinkage takes away every error below `beta^(-1 / (2 - p))`, which never falls under 0.146.
Rounding errors of weights are ten to a thousand times smaller, so that what runs in practice is the
plain alternation "codes for a given zero, zero for given codes" in the least-squares sense, and the
power function computes nothing.

This solver keeps that alternation and goes on from where it ends:

- the scale is refitted together with the zero, by linear regression on the codes, which cannot
  raise the error;
- a second start from nine tenths of the range often ends lower; the better end wins;
- whole zeros are rounded inside the loop, and the scale and the codes follow them. A zero step
  alone moves nothing there, since the step is under one half: it is the scale that helps;
- scale and zero are rounded to the type they are stored in before the last codes are chosen.

A group's result depends on nothing outside the group. `benchmarks/weight_solver.py` has the
figures: 6 to 9 % less squared error than HQQ at 4 bit, with real zeros and with whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mla_deploy.errors import CheckpointError

LARGEST_SCALE = torch.finfo(torch.float16).max
TINY = 1e-30
"""Scales below it count as zero: their reciprocal could leave float32. Float16 ends at 6e-8."""
ZERO_STEPS = 20
"""HQQ's: codes for the zero, zero for the codes, at a fixed scale."""
ROUNDS = {("exact", 4): 5, ("integer", 4): 3, ("exact", 8): 2, ("integer", 8): 2}
"""Refits of the scale by kind of zeros and bits; more gain less than 1 %."""
STARTS = {4: (1.0, 0.9), 8: (1.0,)}
"""Parts of a group's range to start from, by bits. At 8 bit clipping never pays."""


class Groups(NamedTuple):
    """Quantised groups: `weight = (code - zero) * scale`.

    Shapes: codes [G, group] uint8; scale [G, 1] float16; zero [G, 1] uint8 or float16;
    squared_error [G, 1] float32.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    squared_error: torch.Tensor


def solve(x: torch.Tensor, bits: int, zeros: str) -> Groups:
    """Quantise groups of weights, each for itself.

    Args:
        x: [G, group] float32, finite.
        bits: 4 or 8.
        zeros: `integer` (whole, 0 to 2^bits - 1) or `exact` (real, float16).

    Raises:
        CheckpointError: values so large that float16 cannot hold the scale.
    """
    solver = _Exact(x, bits) if zeros == "exact" else _Integer(x, bits)
    candidates = (
        solver.finish(*solver.alternate(scale, zero, ROUNDS[zeros, bits]))
        for scale, zero in solver.starts()
    )
    best = next(candidates)
    for other in candidates:
        is_better = other.squared_error < best.squared_error
        best = Groups(
            *(torch.where(is_better, new, old) for new, old in zip(other, best, strict=True))
        )
    return best


class _Solver:
    """What both kinds of zeros share. All per-group values are [G, 1] float32."""

    def __init__(self, x: torch.Tensor, bits: int) -> None:
        self.x = x
        self.bits = bits
        self.levels = 2**bits - 1
        self.low = x.amin(-1, keepdim=True)
        self.high = x.amax(-1, keepdim=True)
        self.mean = x.mean(-1, keepdim=True)
        self._codes = torch.empty_like(x)
        span = float((self.high.clamp_min(0) - self.low.clamp_max(0)).max())
        if not span <= LARGEST_SCALE * self.levels:
            raise CheckpointError(
                "weights are too large to be quantised: float16 cannot hold their scale",
                found=f"a range of {span:.3g} in one group",
                allowed=f"up to {LARGEST_SCALE * self.levels:.3g} at {bits} bit",
                hint="check the checkpoint; keep these matrices in floating point",
            )

    def codes(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest codes [G, group], as float32, in a buffer that the next call overwrites."""
        inverse = torch.where(scale > TINY, 1.0 / scale, 0.0)
        codes = torch.mul(self.x, inverse, out=self._codes)
        return codes.add_(zero).round_().clamp_(0, self.levels)

    def measured(self, scale: torch.Tensor, zero: torch.Tensor, zero_type: torch.dtype) -> Groups:
        """Codes and error for a scale and zero that already are what will be stored."""
        codes = self.codes(scale, zero)
        stored_codes = codes.to(torch.uint8)
        error = codes.sub_(zero).mul_(scale).sub_(self.x)
        squared_error = torch.linalg.vecdot(error, error).unsqueeze(-1)
        return Groups(stored_codes, scale.to(torch.float16), zero.to(zero_type), squared_error)


class _Exact(_Solver):
    """Real zeros: linear regression on the codes gives scale and zero at once."""

    def starts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        middle = (self.high + self.low) / 2
        for part in STARTS[self.bits]:
            scale = part * (self.high - self.low) / self.levels
            zero = self.levels / 2 - _divide(middle, scale)
            if part == 1.0:
                zero = self._half_quadratic(scale, zero)
            yield scale, zero
        if bool(((self.low > 0) | (self.high < 0)).any()):
            # Far from zero and narrow: the zero would need more digits than float16 has, and a
            # range that holds zero does better.
            low = self.low.clamp_max(0)
            scale = (self.high.clamp_min(0) - low) / self.levels
            yield scale, -_divide(low, scale)

    def _half_quadratic(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """HQQ: the zero for a fixed scale, where the shrinkage leaves no error standing."""
        mean_steps = _divide(self.mean, scale)
        for _ in range(ZERO_STEPS):
            zero = self.codes(scale, zero).mean(-1, keepdim=True) - mean_steps
        return zero

    def alternate(
        self, scale: torch.Tensor, zero: torch.Tensor, rounds: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.x.shape[-1]
        for _ in range(rounds):
            codes = self.codes(scale, zero)
            code_mean = codes.mean(-1, keepdim=True)
            products = torch.linalg.vecdot(codes, self.x).unsqueeze(-1)
            squares = torch.linalg.vecdot(codes, codes).unsqueeze(-1)
            spread = squares - size * code_mean * code_mean
            slope = (products - size * code_mean * self.mean) / spread.clamp_min(0.5)
            is_fit = (spread > 0.5) & (slope > 0)  # otherwise all codes are equal
            scale = torch.where(is_fit, slope, scale)
            zero = torch.where(is_fit, code_mean - _divide(self.mean, scale), zero)
        return scale, zero

    def finish(self, scale: torch.Tensor, zero: torch.Tensor) -> Groups:
        stored_scale = _stored_scale(scale)
        # The zero moves with the rounded scale: what must stay put is the group's mean.
        zero = zero + _divide(self.mean, scale) - _divide(self.mean, stored_scale)
        return self.measured(stored_scale, self._stored_zero(zero), torch.float16)

    @staticmethod
    def _stored_zero(zero: torch.Tensor) -> torch.Tensor:
        return zero.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16).float()


class _Integer(_Solver):
    """Whole zeros: least-squares scale for codes and zero, then the zero rounded, in turns."""

    def starts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Zero itself always has a code, so the range must hold it.
        low, high = self.low.clamp_max(0), self.high.clamp_min(0)
        for part in STARTS[self.bits]:
            scale = part * (high - low) / self.levels
            middle = (high + low) / 2
            yield scale, self._whole(self.levels / 2 - _divide(middle, scale))

    def alternate(
        self, scale: torch.Tensor, zero: torch.Tensor, rounds: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(rounds):
            scale, code_mean = self._refit(scale, zero)
            zero = self._whole(code_mean - _divide(self.mean, scale))
        return self._refit(scale, zero)[0], zero

    def finish(self, scale: torch.Tensor, zero: torch.Tensor) -> Groups:
        return self.measured(_stored_scale(scale), zero, torch.uint8)

    def _refit(self, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least-squares scale for the nearest codes, and the mean of those codes."""
        codes = self.codes(scale, zero)
        code_mean = codes.mean(-1, keepdim=True)
        steps = codes.sub_(zero)
        squares = torch.linalg.vecdot(steps, steps).unsqueeze(-1)
        slope = torch.linalg.vecdot(steps, self.x).unsqueeze(-1) / squares.clamp_min(0.5)
        return torch.where(slope > 0, slope, scale), code_mean

    def _whole(self, zero: torch.Tensor) -> torch.Tensor:
        return zero.round().clamp(0, self.levels)


def _stored_scale(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp_max(LARGEST_SCALE).to(torch.float16).float()


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x / scale`, and zero where the scale is as good as zero."""
    return torch.where(scale > TINY, x / scale, 0.0)
