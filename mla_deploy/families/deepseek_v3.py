"""DeepSeek-V3, R1, Moonlight and Kimi-K2 (arXiv 2412.19437)."""

from __future__ import annotations

from typing import ClassVar

import torch

from mla_deploy.config import MlaConfig, MoeConfig, read_common, read_moe
from mla_deploy.config_reader import ConfigReader
from mla_deploy.families.base import Family
from mla_deploy.modules.mlp import Router
from mla_deploy.sources import Stored


class SigmoidRouter(Router):
    """`noaux_tc`: sigmoid scores, chosen with a bias that does not enter the weights.

    Section 2.1.2: a group's score is the sum of its two best biased scores; experts outside the
    best groups are out of the running; the weights of the chosen are their unbiased scores.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, moe: MoeConfig, hidden: int, prefix: str) -> None:
        super().__init__(moe, hidden, prefix)
        shape = (moe.n_routed_experts,)
        name = "e_score_correction_bias"
        self.declare(name, shape, Stored(f"{prefix}.{name}", shape))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moe = self.moe
        scores = self.logits(x).sigmoid()
        selection = scores + self.e_score_correction_bias
        if moe.topk_group < moe.n_group:
            best_two = selection.unflatten(1, (moe.n_group, -1)).topk(2, dim=-1).values
            selection = torch.where(self.group_mask(best_two.sum(-1)), selection, float("-inf"))
        weights = scores
        if moe.norm_topk_prob:
            chosen = selection.topk(moe.num_experts_per_tok, dim=-1).indices
            weights = scores / (scores.gather(1, chosen).sum(-1, keepdim=True) + 1e-20)
        return selection, weights * moe.routed_scaling_factor


class DeepseekV3(Family):
    """Dense first layers, then sigmoid-routed experts."""

    model_types: ClassVar[tuple[str, ...]] = ("deepseek_v3", "kimi_k2")

    def read_config(self, keys: ConfigReader) -> MlaConfig:
        keys.expect("topk_method", "noaux_tc")
        keys.expect("scoring_func", "sigmoid")
        moe = read_moe(keys, "noaux_tc", norm_topk_prob=True)
        return read_common(keys, moe, rope_interleave=keys.flag("rope_interleave", True))

    def router(self, moe: MoeConfig, hidden: int, prefix: str) -> Router:
        return SigmoidRouter(moe, hidden, prefix)
