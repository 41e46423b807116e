"""Frequencies of rotary positions, and the softmax scale that goes with them.

Under YaRN two factors exist and are easily confused: cos and sin are multiplied by
`mscale(mscale) / mscale(mscale_all_dim)`, and the softmax scale by `mscale(mscale_all_dim)^2`
(DeepSeek-V2, section 2.1.4 and its published code).
"""

from __future__ import annotations

import math

import torch

from mla_deploy.config import MlaConfig
from mla_deploy.rope_config import RopeConfig, YarnScaling


def inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Radians a position of each pair. Shapes: to [dim / 2] float32."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    inv_freq = 1.0 / rope.theta**exponent
    if rope.longrope is not None:
        return inv_freq / torch.tensor(rope.longrope.factors)
    if rope.yarn is None:
        return inv_freq
    low, high = _correction_range(rope.yarn, rope.theta, dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope.yarn.factor * ramp + inv_freq * (1 - ramp)


def cos_sin_scale(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by."""
    if rope.longrope is not None:
        return rope.longrope.attention_factor
    yarn = rope.yarn
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def softmax_scale(config: MlaConfig) -> float:
    """What attention scores are multiplied by."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope.yarn
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _correction_range(yarn: YarnScaling, theta: float, dim: int) -> tuple[float, float]:
    """Pairs below the first are kept, pairs above the second are interpolated."""

    def pair_with(rotations: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    return low, high if high != low else high + 0.001
