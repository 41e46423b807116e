"""The body of `ai.mla_deploy::LatentAttention` in standard operators.

It is traced from the reference op, cache record included, so there is nothing to keep in step: what
`mla_deploy.quant.latent_cache` defines is what the function computes. ONNX Runtime inlines it where
our operator library is not registered.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from mla_deploy.cache import cache_record
from mla_deploy.exporters.onnx import aten
from mla_deploy.exporters.onnx.builder import GraphBuilder
from mla_deploy.exporters.onnx.translate import translate
from mla_deploy.exporters.trace import TensorSpec, trace
from mla_deploy.ops import attention

ATTENTION_DOMAIN = "ai.mla_deploy"
OPSET = 24
"""Of the graph for the CPU."""


class AttentionFunctions:
    """The function bodies that a model needs, one for each set of attributes."""

    def __init__(self, opset: int = OPSET, dtype: torch.dtype = torch.float32) -> None:
        """Args:
        opset: of the graph that they are part of.
        dtype: of q, kv and the output.
        """
        self.opset = opset
        self.dtype = dtype
        self.functions: list[ir.Function] = []
        self._overloads: dict[tuple[Any, ...], str] = {}

    def overload(self, attributes: dict[str, Any], weight_dtype: torch.dtype) -> str:
        """The overload with these attributes, made when it first comes up."""
        key = (*attributes.items(), weight_dtype)
        if key not in self._overloads:
            name = attributes["cache_format"]
            taken = sum(1 for other in self._overloads.values() if other.startswith(name))
            self._overloads[key] = f"{name}_{taken + 1}" if taken else name
            self.functions.append(self._function(attributes, weight_dtype, self._overloads[key]))
        return self._overloads[key]

    def _function(
        self, attributes: dict[str, Any], weight_dtype: torch.dtype, overload: str
    ) -> ir.Function:
        builder = GraphBuilder()
        specs, cache = _specs(attributes, self.dtype, weight_dtype)
        inputs = {spec.name: builder.input(spec.name, None, None) for spec in [*specs, *cache]}
        traced = trace(_Body(attributes), [*specs, cache])
        outputs = translate(traced, builder, aten.TABLE, inputs, {}, "")
        names = ["output", *(f"present_{part.name}" for part in cache)]
        for name, value in zip(names, outputs, strict=True):
            value.name = name
        graph = ir.Graph(
            list(inputs.values()),
            outputs,
            nodes=builder.nodes,
            opset_imports={"": self.opset},
            name="LatentAttention",
        )
        declared = [ir.Attr(name, _kind(value), None) for name, value in attributes.items()]
        return ir.Function(
            ATTENTION_DOMAIN, "LatentAttention", overload, graph=graph, attributes=declared
        )


class _Body(nn.Module):
    """The reference op on tensors only."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__()
        self.attributes = attributes

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        block_table: torch.Tensor,
        past_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        cache: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return attention.reference(
            q,
            kv,
            cos,
            sin,
            w_uk,
            w_uv,
            block_table,
            past_lengths,
            new_lengths,
            cache,
            self.attributes["cache_format"],
            self.attributes["softmax_scale"],
            self.attributes["latent_norm_epsilon"],
            self.attributes["mode"],
        )


def _specs(
    attributes: dict[str, Any], dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs, and the parts of the cache, which follow."""
    heads, nope = attributes["num_heads"], attributes["qk_nope_head_dim"]
    rope, v_dim = attributes["qk_rope_head_dim"], attributes["v_head_dim"]
    rank = attributes["kv_lora_rank"]
    parts = cache_record(attributes["cache_format"]).parts(rank, rope)
    specs = [
        TensorSpec("q", ("B", "S", heads * (nope + rope)), dtype),
        TensorSpec("kv", ("B", "S", rank + rope), dtype),
        TensorSpec("cos", ("B", "S", rope // 2)),
        TensorSpec("sin", ("B", "S", rope // 2)),
        TensorSpec("w_uk", (heads, nope, rank), weight_dtype),
        TensorSpec("w_uv", (heads, rank, v_dim), weight_dtype),
        TensorSpec("block_table", ("B", "M"), torch.int64),
        TensorSpec("past_lengths", ("B",), torch.int64),
        TensorSpec("new_lengths", ("B",), torch.int64),
    ]
    return specs, [TensorSpec(part.name, ("P", *part.page_shape), part.dtype) for part in parts]


def _kind(value: Any) -> ir.AttributeType:
    kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
    return kinds[type(value)]
