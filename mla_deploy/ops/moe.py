"""The routed experts of a mixture of experts.

The router is the family's own; it hands over two [T, E] matrices: `selection`, whose `top_k`
largest entries a token name its experts, and `weights`, with which the chosen outputs are added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op

from mla_deploy.packing import dequantize


@custom_op("mla_deploy::moe", mutates_args=())
def moe(
    x: torch.Tensor,
    selection: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """`sum_e weights_e * down_e(silu(gate_e x) * up_e x)` over the chosen experts.

    Shapes: x [B, S, D], selection and weights [B * S, E], gate_up [E, 2 I, D] with the rows of gate
    and up interleaved (g0, u0, g1, u1, ...), down [E, D, I], to [B, S, D].
    """
    tokens = x.reshape(-1, x.shape[-1])
    chosen = selection.topk(top_k, dim=-1).indices  # [T, K]
    output = torch.zeros_like(tokens)
    for expert in chosen.unique().tolist():
        rows = (chosen == expert).any(-1).nonzero().squeeze(1)
        gate, up = (
            F.linear(tokens[rows], gate_up[expert].to(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
        )
        result = F.linear(F.silu(gate) * up, down[expert].to(x.dtype))
        output.index_add_(0, rows, result * weights[rows, expert, None].to(x.dtype))
    return output.reshape(x.shape)


@moe.register_fake
def _(
    x: torch.Tensor,
    selection: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    return torch.empty_like(x)


@custom_op("mla_deploy::moe_quantized", mutates_args=())
def moe_quantized(
    x: torch.Tensor,
    selection: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    top_k: int,
    bits: int,
) -> torch.Tensor:
    """`moe` with quantised experts: `gate_up` and `down` are codes, scales, zeros.

    Shapes: as in `moe` and `mla_deploy.packing`, each with the experts as leading axis.
    """
    used = selection.topk(top_k, dim=-1).indices.unique()
    dense = [
        dequantize(codes[used], scales[used], zeros[used], bits, x.dtype)
        for codes, scales, zeros in (gate_up, down)
    ]
    return moe(x, selection[:, used], weights[:, used], *dense, top_k)


@moe_quantized.register_fake
def _(
    x: torch.Tensor,
    selection: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    top_k: int,
    bits: int,
) -> torch.Tensor:
    return torch.empty_like(x)
