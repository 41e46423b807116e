"""Latent attention in plain operators, over a cache of rows.

The cache of a sequence is a row a token, [1, P, width] for each part of the record. The graph reads
the first P rows and gives the rows of the S new tokens, which the runner copies behind the old
ones: one copy of S rows, never of the cache.

          cache rows [P] -- decode --+
                                     +-- where(row >= past) -- attend (absorbed)
    kv -- norm, rope -- encode --+-- decode, spread to P --+
                                 |
                                 +-- new rows [S]

P is what the caller binds, at least past + S. Encoding, decoding and attention are the reference's,
traced, as the record is defined in `mla_deploy.quant.latent_cache` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from mla_deploy.cache import cache_record
from mla_deploy.exporters.onnx.aten import stored
from mla_deploy.exporters.onnx.translate import Context, Lowering, Weight, translate
from mla_deploy.exporters.trace import TensorSpec, Trace, trace
from mla_deploy.ops import attention


class _Body(nn.Module):
    """The reference op on rows instead of pages, for one sequence."""

    def __init__(
        self,
        cache_format: str,
        heads: int,
        nope: int,
        rank: int,
        softmax_scale: float,
        latent_norm_epsilon: float,
    ) -> None:
        super().__init__()
        self.cache_format = cache_format
        self.heads = heads
        self.nope = nope
        self.rank = rank
        self.softmax_scale = softmax_scale
        self.latent_norm_epsilon = latent_norm_epsilon

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        past_lengths: torch.Tensor,
        cache: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        record, dtype = cache_record(self.cache_format), q.dtype
        c_kv, k_pe = attention.new_latents(
            kv.float(), cos, sin, self.rank, self.latent_norm_epsilon
        )
        rows = [part.unsqueeze(0) for part in record.encode(c_kv.flatten(0, 1), k_pe.flatten(0, 1))]
        new, held = record.decode(rows, dtype), record.decode(cache, dtype)
        step = torch.arange(cache[0].shape[1]) - past_lengths  # of each row among the new ones
        is_new = step >= 0
        # Rows behind the last new one are hidden by the causal mask, whatever they hold.
        step = torch.where(step < q.shape[1], step, 0)
        step = torch.where(is_new, step, 0)
        c_kv, k_pe = (
            torch.where(is_new.unsqueeze(1), fresh.index_select(1, step), old)
            for fresh, old in zip(new, held, strict=True)
        )
        # Scaled before the product, which could leave float16.
        scaled = q.float() * self.softmax_scale
        queries = attention.new_queries(scaled, cos, sin, self.heads, self.nope)
        q_nope, q_pe = (part.to(dtype) for part in queries)
        output = attention.attend_absorbed(
            q_nope, q_pe, c_kv, k_pe, w_uk.to(dtype), w_uv.to(dtype), past_lengths, 1.0
        )
        return output, rows


@dataclass(frozen=True)
class LatentAttentionLowering:
    """Lowers `mla_deploy::latent_attention`; a body of each kind is traced once."""

    table: Mapping[object, Lowering]
    traces: dict[tuple[Any, ...], Trace] = field(default_factory=dict)

    def __call__(
        self,
        c: Context,
        q: ir.Value,
        kv: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        w_uk: Weight,
        w_uv: Weight,
        block_table: None,
        past_lengths: ir.Value,
        new_lengths: None,
        cache: list[ir.Value],
        cache_format: str,
        softmax_scale: float,
        latent_norm_epsilon: float,
        mode: str,
    ) -> tuple[ir.Value, list[ir.Value]]:
        heads, nope, rank = w_uk.shape
        rope = 2 * c.fakes[2].shape[-1]
        dtype = c.result[0].dtype
        parts = cache_record(cache_format).parts(rank, rope)
        body = _Body(cache_format, heads, nope, rank, softmax_scale, latent_norm_epsilon)
        specs: list[TensorSpec | list[TensorSpec] | None] = [
            TensorSpec("q", (1, "S", heads * (nope + rope)), dtype),
            TensorSpec("kv", (1, "S", rank + rope), dtype),
            TensorSpec("cos", (1, "S", rope // 2)),
            TensorSpec("sin", (1, "S", rope // 2)),
            TensorSpec("w_uk", w_uk.shape, w_uk.dtype),
            TensorSpec("w_uv", w_uv.shape, w_uv.dtype),
            TensorSpec("past_lengths", (1,), torch.int64),
            [TensorSpec(part.name, (1, "P", part.width), part.dtype) for part in parts],
        ]
        key = (cache_format, *w_uv.shape, nope, rope, softmax_scale, latent_norm_epsilon, dtype)
        if key not in self.traces:
            self.traces[key] = trace(body, specs)
        values = {
            "q": q,
            "kv": kv,
            "cos": cos,
            "sin": sin,
            "w_uk": stored(c, w_uk),
            "w_uv": stored(c, w_uv),
            "past_lengths": past_lengths,
            **{part.name: value for part, value in zip(parts, cache, strict=True)},
        }
        with c.builder.own_symbols():
            scope = f"{c.builder.scope}/latent_attention"
            output, *rows = translate(self.traces[key], c.builder, self.table, values, {}, scope)
        return output, rows
