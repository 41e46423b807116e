"""MiniCPM3 (OpenBMB): dense MLA, with the scaled branches of MiniCPM (arXiv 2404.06395).

With `s = scale_depth / sqrt(num_hidden_layers)` the published model computes

    h_0 = scale_emb * E[token],    h_{l+1} = h_l + s * f_l(RMSNorm(h_l)),
    logits = W RMSNorm(h_L) * dim_model_base / hidden_size

Branches read h through a norm only. In `r = h / s` the same is

    r_0 = (scale_emb / s) * E[token],    r_{l+1} = r_l + f_l(RMSNorm'(r_l))

with `rms_norm_eps / s^2` in RMSNorm': a decoder like the others, and nothing is scaled in a layer.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mla_deploy.config import MlaConfig, read_common
from mla_deploy.config_reader import ConfigReader
from mla_deploy.families.base import Family


class MiniCpm3(Family):
    """Dense throughout; rotary channels as halves; often LongRoPE."""

    model_types = ("minicpm3",)

    def read_config(self, keys: ConfigReader) -> MlaConfig:
        keys.expect("mlp_bias", False)
        hidden, heads = keys.positive("hidden_size"), keys.positive("num_attention_heads")
        config = read_common(
            keys,
            moe=None,
            rms_norm_eps=1e-5,
            v_head_dim=int(hidden // heads),
            tie_word_embeddings=True,
            rope_interleave=False,
        )
        branch = keys.positive("scale_depth") / math.sqrt(config.num_hidden_layers)
        return replace(
            config,
            rms_norm_eps=config.rms_norm_eps / branch**2,
            embedding_scale=keys.positive("scale_emb") / branch,
            logit_scale=keys.positive("dim_model_base") / hidden,
        )
