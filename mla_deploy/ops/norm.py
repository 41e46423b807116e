"""RMSNorm (Zhang and Sennrich, 2019), computed in float32 or wider."""

from __future__ import annotations

import torch
from torch.library import custom_op


def normalize(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + epsilon)` over the last axis, in plain torch."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon)


@custom_op("mla_deploy::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Shapes: x [..., D], weight [D], to [..., D] of the weight's type."""
    return (normalize(x, epsilon) * weight.to(x.dtype)).to(weight.dtype)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.empty_like(x, dtype=weight.dtype)


@custom_op("mla_deploy::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + residual` in the weight's type, and that sum in the wider type of the two.

    Shapes: all [B, S, D] but weight [D].
    """
    total = x + residual
    return (normalize(total, epsilon) * weight.to(total.dtype)).to(weight.dtype), total


@add_rms_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=weight.dtype), torch.empty_like(x, dtype=total)
