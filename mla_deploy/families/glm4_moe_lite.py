"""GLM-4.7-Flash: DeepSeek-V3's architecture with a wider head and its own defaults."""

from __future__ import annotations

from mla_deploy.config import MlaConfig, read_common, read_moe
from mla_deploy.config_reader import ConfigReader
from mla_deploy.errors import ConfigError
from mla_deploy.families.deepseek_v3 import DeepseekV3


class Glm4MoeLite(DeepseekV3):
    """Dense first layer, then sigmoid-routed experts."""

    model_types = ("glm4_moe_lite",)

    def read_config(self, keys: ConfigReader) -> MlaConfig:
        keys.expect("topk_method", "noaux_tc")
        moe = read_moe(keys, "noaux_tc", norm_topk_prob=True, first_k_dense_replace=1)
        interleave = keys.flag("rope_interleave", True)
        config = read_common(keys, moe, rms_norm_eps=1e-5, rope_interleave=interleave)
        kinds = keys.get("mlp_layer_types")
        if moe is not None and kinds is not None:
            ours = ["dense", "sparse"]
            expected = [ours[moe.is_moe_layer(i)] for i in range(config.num_hidden_layers)]
            if kinds != expected:
                raise ConfigError(
                    f"{keys.origin}: mlp_layer_types does not follow first_k_dense_replace",
                    found=", ".join(map(str, kinds)),
                    allowed=", ".join(expected),
                )
        return config
