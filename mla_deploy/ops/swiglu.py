"""SwiGLU (Shazeer, 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op


@custom_op("mla_deploy::swiglu", mutates_args=())
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`. Shapes: gate_up [..., 2 I], gate first, to [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@swiglu.register_fake
def _(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
