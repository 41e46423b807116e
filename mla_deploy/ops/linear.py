"""Products with quantised matrices; `mla_deploy.packing` has the layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op

from mla_deploy.packing import dequantize


@custom_op("mla_deploy::linear_quantized", mutates_args=())
def linear_quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """`x @ weight^T + bias`. Shapes: x [..., in], bias [out], to [..., out]."""
    weight = dequantize(codes, scales, zeros, bits, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@linear_quantized.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@custom_op("mla_deploy::embedding_quantized", mutates_args=())
def embedding_quantized(
    ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> torch.Tensor:
    """Rows of a quantised table in float32. Shapes: ids [B, S], to [B, S, D]."""
    return dequantize(codes[ids], scales[ids], zeros[ids], bits, torch.float32)


@embedding_quantized.register_fake
def _(
    ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> torch.Tensor:
    return torch.empty((*ids.shape, codes.shape[1] * 8 // bits), dtype=torch.float32)
