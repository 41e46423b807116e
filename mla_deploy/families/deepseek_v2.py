"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434)."""

from __future__ import annotations

import torch

from mla_deploy.config import MlaConfig, MoeConfig, read_common, read_moe
from mla_deploy.config_reader import ConfigReader
from mla_deploy.families.base import Family
from mla_deploy.modules.mlp import Router


class SoftmaxRouter(Router):
    """Softmax scores, greedy over all experts or within the best groups."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.logits(x).softmax(dim=-1)
        selection = scores
        if self.moe.topk_method == "group_limited_greedy":
            best_of_group = scores.unflatten(1, (self.moe.n_group, -1)).amax(-1)
            selection = torch.where(self.group_mask(best_of_group), scores, 0.0)
        return selection, scores * self.moe.routed_scaling_factor


class DeepseekV2(Family):
    """Dense first layers, then softmax-routed experts."""

    model_types = ("deepseek_v2",)

    def read_config(self, keys: ConfigReader) -> MlaConfig:
        # V2's published code and transformers disagree on what normalised weights would mean.
        keys.expect("norm_topk_prob", False, None)
        keys.expect("scoring_func", "softmax")
        keys.expect("mlp_bias", False)
        keys.expect("topk_method", "greedy", "group_limited_greedy")
        return read_common(
            keys, read_moe(keys, keys.text("topk_method", "greedy"), norm_topk_prob=False)
        )

    def router(self, moe: MoeConfig, hidden: int, prefix: str) -> Router:
        return SoftmaxRouter(moe, hidden, prefix)
