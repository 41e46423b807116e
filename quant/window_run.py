"""A window of text through an unquantised model, a layer at a time, with any cache in any layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mla_deploy.cache import cache_record, pages_for
from mla_deploy.config import MlaConfig
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.decoder import Decoder
from mla_deploy.modules.linear import Norm
from mla_deploy.ops import attention
from mla_deploy.quant.fold import LatentRotation

EXACT = "fp32"
"""The record that changes nothing."""


class WindowRun:
    """One window on its way through an unquantised model, layer by layer."""

    def __init__(self, model: Decoder, config: MlaConfig, ids: Sequence[int]) -> None:
        self.model = model
        self.config = config
        self._ids = torch.tensor([list(ids)])
        self._steps = len(ids)
        self._pages = pages_for(len(ids))
        past = torch.zeros(1, dtype=torch.int64)
        x, cos, sin = model.prologue(self._ids, past)
        self.start: tuple[torch.Tensor, torch.Tensor | None] = x, None
        table = torch.arange(1, self._pages + 1).unsqueeze(0)
        self._frame = (cos, sin, table, past, torch.tensor([self._steps]))

    def attention(self, layer: int) -> LatentAttention:
        """The layer's attention block."""
        block = self.model.layers[layer].self_attn
        assert isinstance(block, LatentAttention)
        return block

    def normed(self, layer: int, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """What the attention block of a layer is given."""
        norm = self.model.layers[layer].input_layernorm
        assert isinstance(norm, Norm)
        output: torch.Tensor = norm(x) if residual is None else norm.after_add(x, residual)[0]
        return output

    def layer_inputs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """x and residual before each layer, the layers before it computed exactly."""
        x, residual = self.start
        for layer in range(self.config.num_hidden_layers):
            yield x, residual
            if layer + 1 < self.config.num_hidden_layers:
                x, residual = self.layer(layer, x, residual)

    def layer(
        self, layer: int, x: torch.Tensor, residual: torch.Tensor | None, name: str = EXACT
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and residual behind a layer whose cache is the record of that name."""
        self.attention(layer).cache_format = name
        x, residual, _ = self.model.layers[layer](x, residual, *self._frame, self._cache(name))
        return x, residual

    def attend(self, layer: int, normed: torch.Tensor, name: str) -> torch.Tensor:
        """The output of the attention block alone. Shapes: [1, S, hidden] to the same."""
        block = self.attention(layer)
        block.cache_format = name
        output: torch.Tensor = block(normed, *self._frame, self._cache(name))[0]
        return output

    def latents(self, layer: int, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's cache is given: c_kv [S, rank], k_pe [S, rope]."""
        block = self.attention(layer)
        _, kv = block.project(normed)
        cos, sin, *_ = self._frame
        rank = self.config.kv_lora_rank
        c_kv, k_pe = attention.new_latents(kv, cos, sin, rank, block.latent_norm_epsilon)
        return c_kv[0], k_pe[0]

    def log_probabilities(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Shapes: to [S, vocab_size]."""
        every = torch.arange(self._steps).unsqueeze(0)
        logits: torch.Tensor = self.model.epilogue(x, residual, every)
        return logits[0].log_softmax(-1)

    def _cache(self, name: str) -> list[torch.Tensor]:
        parts = cache_record(name).parts(self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        return [part.empty(self._pages + 1) for part in parts]


@contextmanager
def rotated(block: LatentAttention, rotation: LatentRotation | None) -> Iterator[None]:
    """The attention block with its latent rotated, as `fold` does it, while the context lasts."""
    if rotation is None:
        yield
        return
    w_uk, w_uv = block.get_parameter("w_uk").data, block.get_parameter("w_uv").data
    rank = w_uk.shape[2]
    changed: list[tuple[nn.Module, str, torch.Tensor]] = []

    def put(owner: nn.Module, name: str, value: torch.Tensor) -> None:
        changed.append((owner, name, owner.get_parameter(name).data))
        owner.get_parameter(name).data = value

    def with_rows(old: torch.Tensor, first: int) -> torch.Tensor:
        new, rows = old.clone(), slice(first, first + rank)
        new[rows] = rotation.apply(old[rows].movedim(0, -1)).movedim(-1, 0)
        return new

    for _, linear, first in block.latent_writers():
        put(linear, "weight", with_rows(linear.weight, first))
        if linear.bias is not None:
            put(linear, "bias", with_rows(linear.bias, first))
    put(block, "w_uk", rotation.apply(w_uk))
    put(block, "w_uv", rotation.apply(w_uv.transpose(1, 2)).transpose(1, 2))
    try:
        yield
    finally:
        for owner, name, value in changed:
            owner.get_parameter(name).data = value


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """KL(expected || found), summed over positions."""
    gap = (expected.exp() * (expected - found)).sum(-1)
    return float(gap.clamp_min(0).double().sum())
