"""Feed-forward blocks: dense SwiGLU, and a mixture of them."""

from __future__ import annotations

import torch
from torch import nn

from mla_deploy import ops
from mla_deploy.config import MlaConfig, MoeConfig
from mla_deploy.modules.base import Block
from mla_deploy.modules.linear import Linear, Piece, stored_shapes
from mla_deploy.packing import CODES, SCALES, ZEROS
from mla_deploy.recipe import WeightFormat
from mla_deploy.sources import Expert, Joined, Stored


class SwigluMlp(Block):
    """`down(silu(gate x) * up x)`, gate and up as one matrix. Shapes: x [..., hidden]."""

    def __init__(
        self, hidden: int, intermediate: int, prefix: str, weight_format: WeightFormat | None
    ) -> None:
        super().__init__()
        gate_up = tuple(Piece(f"{prefix}.{name}_proj", intermediate) for name in ("gate", "up"))
        self.gate_up_proj = Linear(hidden, gate_up, weight_format)
        self.down_proj = Linear(
            intermediate, (Piece(f"{prefix}.down_proj", hidden),), weight_format
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ops.swiglu(self.gate_up_proj(x)))


class Experts(Block):
    """The routed experts; `ops.moe` has the shapes."""

    def __init__(
        self, moe: MoeConfig, hidden: int, prefix: str, weight_format: WeightFormat | None
    ) -> None:
        super().__init__()
        self.top_k = moe.num_experts_per_tok
        self.weight_format = weight_format
        inner = moe.moe_intermediate_size
        self._declare_stack("gate_up", ("gate_proj", "up_proj"), inner, hidden, moe, prefix)
        self._declare_stack("down", ("down_proj",), hidden, inner, moe, prefix)

    def _declare_stack(
        self,
        name: str,
        matrices: tuple[str, ...],
        rows: int,
        columns: int,
        moe: MoeConfig,
        prefix: str,
    ) -> None:
        experts = moe.n_routed_experts
        shapes = stored_shapes((rows,), columns, self.weight_format)
        for part, (shape, dtype) in shapes.items():
            stack = Joined(
                tuple(
                    Expert(tuple(Stored(f"{prefix}.{e}.{m}.{part}", shape) for m in matrices))
                    for e in range(experts)
                )
            )
            full = (experts, len(matrices) * shape[0], *shape[1:])
            self.declare(f"{name}_{part}", full, stack, dtype)

    def forward(
        self, x: torch.Tensor, selection: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if self.weight_format is None:
            return ops.moe(x, selection, weights, self.gate_up_weight, self.down_weight, self.top_k)
        gate_up, down = (
            [self.get_parameter(f"{name}_{part}") for part in (CODES, SCALES, ZEROS)]
            for name in ("gate_up", "down")
        )
        bits = self.weight_format.bits
        return ops.moe_quantized(x, selection, weights, gate_up, down, self.top_k, bits)


class MoeMlp(Block):
    """Routed experts, chosen by the family's router, plus shared ones. Shapes: x [B, S, hidden]."""

    def __init__(self, config: MlaConfig, moe: MoeConfig, prefix: str, router: nn.Module) -> None:
        super().__init__()
        recipe = config.recipe
        self.gate = router
        self.experts = Experts(moe, config.hidden_size, f"{prefix}.experts", recipe.experts)
        self.has_shared = moe.n_shared_experts > 0
        if self.has_shared:
            self.shared_experts = SwigluMlp(
                config.hidden_size,
                moe.moe_intermediate_size * moe.n_shared_experts,
                f"{prefix}.shared_experts",
                recipe.linear,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        selection, weights = self.gate(x.flatten(0, 1))
        routed = self.experts(x, selection, weights)
        return routed + self.shared_experts(x) if self.has_shared else routed


class Router(Block):
    """Base of the routers: float32 logits of the experts.

    Shapes: x [T, hidden], to selection and weights [T, E] as `ops.moe` wants them.
    """

    weight: torch.Tensor

    def __init__(self, moe: MoeConfig, hidden: int, prefix: str) -> None:
        super().__init__()
        self.moe = moe
        shape = (moe.n_routed_experts, hidden)
        self.declare("weight", shape, Stored(f"{prefix}.weight", shape))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: [T, hidden] to [T, E]."""
        return nn.functional.linear(x.float(), self.weight)

    def group_mask(self, group_scores: torch.Tensor) -> torch.Tensor:
        """Which experts lie in the best `topk_group` groups. Shapes: [T, groups] to [T, E] bool."""
        best = group_scores.topk(self.moe.topk_group, dim=-1).indices
        mask = torch.zeros_like(group_scores).scatter(1, best, 1.0)
        size = self.moe.n_routed_experts // self.moe.n_group
        return mask.unsqueeze(2).expand(-1, -1, size).flatten(1) > 0
