"""The decoder as TensorRT sees it: one sequence, and a cache of rows.

Inputs (S new tokens, P rows of the cache, at least past_lengths + S, L logits wanted):

| name | type | shape |
|---|---|---|
| `input_ids` | int64 | [1, S] |
| `past_lengths` | int64 | [1] |
| `logit_index` | int64 | [1, L] |
| `cache.{layer}.{part}` | the part's | [1, P, width] |

and outputs: `logits` float32 [1, L, vocab_size], `new.{layer}.{part}` [1, S, width]: the rows of
the new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from mla_deploy.cache import CachePart
from mla_deploy.exporters.onnx.builder import DTYPES, GraphBuilder
from mla_deploy.exporters.onnx.graph import Target
from mla_deploy.exporters.tensorrt.capability import Capability
from mla_deploy.exporters.tensorrt.lowering import table


class TensorRt(Target):
    """A graph for TensorRT's parser."""

    batch = 1
    sequence_inputs: Sequence[str] = ("input_ids", "past_lengths", "logit_index")

    def __init__(self, capability: Capability, dtype: torch.dtype) -> None:
        """Args:
        dtype: of activations, float matrices and scales.
        """
        self.dtype = dtype
        self.table = table(capability, dtype)
        self.opset_imports = {"": capability.opset}

    def cache_input(self, builder: GraphBuilder, layer: int, part: CachePart) -> ir.Value:
        return builder.input(f"cache.{layer}.{part.name}", part.dtype, (1, "rows", part.width))

    def cache_value(self, builder: GraphBuilder, value: ir.Value, part: CachePart) -> ir.Value:
        if part.dtype is torch.uint8:
            return builder.op("Cast", value, to=DTYPES[self.dtype].value)
        if part.dtype is torch.int8:
            return builder.op("DequantizeLinear", value, builder.constant(1.0, self.dtype))
        return value

    def cache_output(
        self, builder: GraphBuilder, value: ir.Value, layer: int, part: CachePart
    ) -> ir.Value:
        if part.dtype is torch.uint8:
            value = builder.op("Cast", value, to=ir.DataType.UINT8.value)
        elif part.dtype is torch.int8:
            zero = builder.constant(0, torch.int8)
            value = builder.op("QuantizeLinear", value, builder.constant(1.0, self.dtype), zero)
        value.name = f"new.{layer}.{part.name}"
        value.type = ir.TensorType(DTYPES[part.dtype])
        value.shape = ir.Shape([1, "tokens", part.width])
        return value
