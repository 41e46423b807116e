"""How well each layer's cache keeps its latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mla_deploy.cache import cache_record, pages_for
from mla_deploy.families import load_config
from mla_deploy.model import cache_parts, empty_cache, load_model
from mla_deploy.modules.attention import LatentAttention


@dataclass(frozen=True)
class LayerCacheScore:
    """One layer."""

    format: str
    bytes: int
    """Per token."""
    latent_rotation: int | None
    sqnr_db: float | None
    """Of the latent; None: nothing is lost."""


@torch.no_grad()
def score_latents(path: Path, ids: Sequence[int]) -> list[LayerCacheScore]:
    """Give the checkpoint's own latents to the cache record of each layer.

    Args:
        path: a checkpoint, quantised or not.
        ids: a window of tokens.

    Raises:
        ConfigError, CheckpointError: as `load_model`.
    """
    config = load_config(path)
    recipe = config.recipe
    exact = replace(
        recipe,
        cache_format="fp32",
        layers=tuple(replace(layer, cache_format="fp32") for layer in recipe.layers),
    )
    model = load_model(path)
    for block in model.modules():
        if isinstance(block, LatentAttention):
            block.cache_format = "fp32"
    bare = replace(config, recipe=exact)
    pages = pages_for(len(ids))
    table = torch.arange(1, pages + 1).unsqueeze(0)
    _, cache = model(
        torch.tensor([list(ids)]),
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([len(ids)]),
        table,
        torch.zeros(1, 1, dtype=torch.int64),
        empty_cache(bare, pages + 1),
    )
    scores = []
    for layer, (parts, arrays) in enumerate(zip(cache_parts(bare), cache, strict=True)):
        c_kv, k_pe = (
            part.read(array, table)[0, : len(ids)]
            for part, array in zip(parts, arrays, strict=True)
        )
        own = recipe.of_layer(layer)
        record = cache_record(own.cache_format)
        stored = [part.unsqueeze(0) for part in record.encode(c_kv, k_pe)]
        noise = float((record.decode(stored, torch.float32)[0][0] - c_kv).square().sum())
        energy = float(c_kv.square().sum())
        scores.append(
            LayerCacheScore(
                own.cache_format,
                record.bytes_per_token(config.kv_lora_rank, config.qk_rope_head_dim),
                own.latent_rotation,
                10 * math.log10(energy / noise) if noise else None,
            )
        )
    return scores
