"""Youtu-LLM: DeepSeek-V3's attention with dense feed-forward blocks."""

from __future__ import annotations

from mla_deploy.config import MlaConfig, read_common
from mla_deploy.config_reader import ConfigReader
from mla_deploy.families.base import Family


class Youtu(Family):
    """Dense throughout."""

    model_types = ("youtu", "youtu_llm")

    def read_config(self, keys: ConfigReader) -> MlaConfig:
        keys.get("embedding_initializer_range")  # training only
        interleave = keys.flag("rope_interleave", True)
        return read_common(keys, moe=None, tie_word_embeddings=True, rope_interleave=interleave)
