"""What a family is."""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import ClassVar

from torch import nn

from mla_deploy.config import MlaConfig, MoeConfig
from mla_deploy.config_reader import ConfigReader
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.decoder import Decoder, DecoderLayer, Epilogue, Prologue
from mla_deploy.modules.mlp import MoeMlp, Router, SwigluMlp


class Family(abc.ABC):
    """A model architecture. Override what differs; the defaults are DeepSeek's."""

    model_types: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def read_config(self, keys: ConfigReader) -> MlaConfig:
        """Read every key that matters; what nobody reads is reported as unknown."""

    def router(self, moe: MoeConfig, hidden: int, prefix: str) -> Router:
        """The router of a mixture-of-experts layer."""
        raise NotImplementedError(f"{type(self).__name__} has no mixture of experts")

    def attention(self, config: MlaConfig, layer: int, prefix: str) -> LatentAttention:
        """The attention of a layer."""
        return LatentAttention(config, prefix)

    def mlp(self, config: MlaConfig, layer: int, prefix: str) -> nn.Module:
        """The feed-forward block of a layer."""
        moe = config.moe
        if moe is None or not moe.is_moe_layer(layer):
            return SwigluMlp(
                config.hidden_size, config.intermediate_size, prefix, config.recipe.linear
            )
        return MoeMlp(config, moe, prefix, self.router(moe, config.hidden_size, f"{prefix}.gate"))

    def layer(self, config: MlaConfig, layer: int) -> DecoderLayer:
        """One decoder layer, without storage."""
        config = replace(config, recipe=config.recipe.of_layer(layer))
        prefix = f"model.layers.{layer}"
        attention = self.attention(config, layer, f"{prefix}.self_attn")
        mlp = self.mlp(config, layer, f"{prefix}.mlp")
        return DecoderLayer(config, prefix, attention, mlp, is_first=layer == 0)

    def decoder(self, config: MlaConfig) -> Decoder:
        """The whole model, without storage."""
        layers = [self.layer(config, layer) for layer in range(config.num_hidden_layers)]
        return Decoder(Prologue(config), layers, Epilogue(config))
