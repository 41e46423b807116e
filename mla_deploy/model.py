"""The torch reference of a checkpoint: exact, simple, and held whole in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mla_deploy.cache import CachePart, cache_record, pages_for
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.families import family_of
from mla_deploy.manifest import ModelInfo
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.base import checkpoint_shapes, parameter_sources
from mla_deploy.modules.decoder import Decoder
from mla_deploy.recipe import Recipe
from mla_deploy.sources import Read
from mla_deploy.unused import unused_tensors


def build(config: MlaConfig) -> Decoder:
    """The reference modules, without storage."""
    return family_of(config.model_type, config.model_type).decoder(config)


def load_model(path: Path | str) -> Decoder:
    """The reference of a checkpoint, quantised or not, computing in float32.

    Raises:
        ConfigError, CheckpointError: as `Checkpoint` does.
    """
    checkpoint = Checkpoint(path)
    model = check_weights(checkpoint)
    load_parameters(model, checkpoint.read)
    return model


def check_weights(checkpoint: Checkpoint) -> Decoder:
    """Hold a checkpoint's tensors against its config.json; the model, without storage.

    Raises:
        CheckpointError: one is missing, of another shape, or of no use to the model.
    """
    model = build(checkpoint.config)
    shapes = checkpoint_shapes(model)
    checkpoint.check(shapes)
    unused_tensors(checkpoint, shapes, checkpoint.config)
    return model


def load_parameters(module: nn.Module, read: Read) -> None:
    """Give a module without storage its parameters."""
    for name, parameter, source in list(parameter_sources(module)):
        slabs = [slab.to(parameter.dtype) for slab in source.slabs(read)]
        owner, _, leaf = name.rpartition(".")
        loaded = nn.Parameter(torch.cat(slabs), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, loaded)


def set_attention_mode(model: Decoder, mode: str) -> None:
    """Have every layer compute attention `absorbed` or `expanded`."""
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.mode = mode


def count_parameters(config: MlaConfig) -> int:
    """Numbers in the source checkpoint of a model, each tensor once."""
    total = 0
    for shape in checkpoint_shapes(build(unquantized(config))).values():
        total += torch.Size(shape).numel()
    return total


def model_info(config: MlaConfig, eos_token_ids: Iterable[int] = ()) -> ModelInfo:
    """What a manifest says of a model.

    Args:
        eos_token_ids: what ends a text besides what config.json names.
    """
    same = {name: getattr(config, name) for name in ModelInfo.model_fields if hasattr(config, name)}
    same["eos_token_ids"] = list(dict.fromkeys([*config.eos_token_ids, *eos_token_ids]))
    return ModelInfo(parameters=count_parameters(config), **same)


def unquantized(config: MlaConfig) -> MlaConfig:
    """The same model before `quantize`."""
    return replace(config, recipe=Recipe())


def empty_cache(
    config: MlaConfig, pages: int, device: torch.device | None = None
) -> list[list[torch.Tensor]]:
    """Zero-filled arenas of `pages` pages for every layer, the scratch page included."""
    return [[part.empty(pages, device) for part in parts] for parts in cache_parts(config)]


def cache_parts(config: MlaConfig) -> list[tuple[CachePart, ...]]:
    """The arrays of every layer's cache."""
    formats = config.recipe.cache_formats(config.num_hidden_layers)
    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    return [cache_record(name).parts(*sizes) for name in formats]


@torch.no_grad()
def forward_window(model: Decoder, config: MlaConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of fresh sequences of equal length, on the device of `input_ids` and the model.

    Shapes: [B, S] to [B, S, vocab_size].
    """
    batch, steps = input_ids.shape
    pages, device = pages_for(steps), input_ids.device
    block_table = torch.arange(1, batch * pages + 1, device=device).reshape(batch, pages)
    every = torch.arange(steps, device=device).expand(batch, steps)
    past = torch.zeros(batch, dtype=torch.int64, device=device)
    new = torch.full((batch,), steps, device=device)
    cache = empty_cache(config, batch * pages + 1, device)
    logits: torch.Tensor = model(input_ids, past, new, block_table, every, cache)[0]
    return logits
