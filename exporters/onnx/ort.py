"""Lowerings of the deployment ops for ONNX Runtime, table `ort1.31`.

The only place that knows how ONNX Runtime spells them. Operators of the domain `com.microsoft` are
described in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.cache import CachePart
from mla_deploy.exporters.onnx import aten, ort_moe
from mla_deploy.exporters.onnx.aten import add_bias, stored
from mla_deploy.exporters.onnx.attention_function import (
    ATTENTION_DOMAIN,
    OPSET,
    AttentionFunctions,
)
from mla_deploy.exporters.onnx.attention_node import latent_attention
from mla_deploy.exporters.onnx.builder import DTYPES, GraphBuilder
from mla_deploy.exporters.onnx.graph import Target
from mla_deploy.exporters.onnx.ort_weights import (
    ACCURACY_LEVEL,
    CONTRIB,
    cast,
    packed_zeros,
    require_whole_zeros,
    stored_as,
)
from mla_deploy.exporters.onnx.translate import Context, Lowering, Weight
from mla_deploy.exporters.onnx.weights import exact_zero_chunks, plain_chunks

NAME = "ort1.31"
"""Experts are QMoE with weights of its router, which the CPU has from that version on. Without them
and with the operator library 1.24 does, with standard operators 1.27."""
ops = torch.ops.mla_deploy


class OnnxRuntime(Target):
    """The graph that `mla_deploy.manifest` describes: a paged cache, meant to be written in place.

    This one is for the CPU; others say what differs.
    """

    name = NAME
    """Of the lowering table, for the manifest."""
    opset = OPSET

    def __init__(self) -> None:
        attention = AttentionFunctions(self.opset, self.dtype)
        self.opset_imports = {"": self.opset, CONTRIB: 1, ATTENTION_DOMAIN: 1}
        self.table = table(attention)
        self.functions = attention.functions

    def cache_input(self, builder: GraphBuilder, layer: int, part: CachePart) -> ir.Value:
        name = f"cache.{layer}.{part.name}"
        return builder.input(name, part.dtype, ("pages", *part.page_shape))

    def cache_output(
        self, builder: GraphBuilder, value: ir.Value, layer: int, part: CachePart
    ) -> ir.Value:
        value.name = f"present.{layer}.{part.name}"
        value.type = ir.TensorType(DTYPES[part.dtype])
        value.shape = ir.Shape(["pages", *part.page_shape])
        return value


def table(functions: AttentionFunctions) -> dict[object, Lowering]:
    """The lowering table; attention bodies that come up are added to `functions`."""
    return {
        **aten.TABLE,
        ops.latent_attention.default: partial(latent_attention, functions=functions),
        ops.rms_norm.default: _rms_norm,
        ops.add_rms_norm.default: _add_rms_norm,
        ops.swiglu.default: _swiglu,
        ops.linear_quantized.default: _linear_quantized,
        ops.embedding_quantized.default: embedding_quantized,
        ops.moe.default: ort_moe.moe,
        ops.moe_quantized.default: ort_moe.moe_quantized,
    }


def _rms_norm(c: Context, x: ir.Value, weight: Weight, epsilon: float) -> ir.Value:
    """The operator's types are all one: that of x."""
    dtype = c.fakes[0].dtype
    gamma = stored_as(c, weight, dtype)
    normed = c.builder.op("RMSNormalization", x, gamma, axis=-1, epsilon=epsilon)
    return cast(c, normed, dtype, weight.dtype)


def _add_rms_norm(
    c: Context, x: ir.Value, residual: ir.Value, weight: Weight, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """The operator's types are all one: that of the residual."""
    dtype = c.fakes[1].dtype
    normed, mean, deviation, total = c.builder.op(
        "SkipSimplifiedLayerNormalization",
        cast(c, x, c.fakes[0].dtype, dtype),
        residual,
        stored_as(c, weight, dtype),
        domain=CONTRIB,
        outputs=4,
        epsilon=epsilon,
    )
    mean.name = deviation.name = ""  # not wanted
    return cast(c, normed, dtype, weight.dtype), total


def _swiglu(c: Context, gate_up: ir.Value) -> ir.Value:
    gate, up = c.builder.op("Split", gate_up, outputs=2, axis=-1, num_outputs=2)
    # QuickGelu is x * sigmoid(alpha * x), and with alpha 1 that is SiLU in one pass.
    return c.builder.op("Mul", c.builder.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)


def _linear_quantized(
    c: Context,
    x: ir.Value,
    codes: Weight,
    scales: Weight,
    zeros: Weight,
    bias: Weight | None,
    bits: int,
) -> ir.Value:
    """MatMulNBits. Exact zeros become a product with the group sums of x:

    y = MatMulNBits_symmetric(x) + groupsum(x) @ ((2^(bits-1) - zero) * scale)^T
    """
    dtype = c.result.dtype
    rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
    group = columns // scales.shape[1]
    attributes: dict[str, Any] = {
        "K": columns,
        "N": rows,
        "bits": bits,
        "block_size": group,
        "accuracy_level": ACCURACY_LEVEL[dtype],
        "domain": CONTRIB,
    }
    operands = [
        c.builder.initializer(
            codes.name,
            torch.uint8,
            (rows, columns // group, group * bits // 8),
            plain_chunks(codes.source, torch.uint8),
        ),
        stored_as(c, scales, dtype),
    ]
    if zeros.dtype is torch.uint8:
        operands.append(packed_zeros(c, zeros, bits))
        y = c.builder.op("MatMulNBits", x, *operands, **attributes)
    else:
        symmetric = c.builder.op("MatMulNBits", x, *operands, **attributes)
        correction = c.builder.initializer(
            f"{zeros.name}.correction",
            dtype,
            zeros.shape[::-1],
            exact_zero_chunks(scales.source, zeros.source, bits, dtype),
        )
        grouped = c.builder.op("Reshape", x, c.builder.constant([0, 0, -1, group]))
        sums = c.builder.op("ReduceSum", grouped, c.builder.constant([-1]), keepdims=0)
        y = c.builder.op("Add", symmetric, c.builder.op("MatMul", sums, correction))
    return add_bias(c, y, bias)


def embedding_quantized(
    c: Context, ids: ir.Value, codes: Weight, scales: Weight, zeros: Weight, bits: int
) -> ir.Value:
    """GatherBlockQuantized."""
    require_whole_zeros(zeros)
    return c.builder.op(
        "GatherBlockQuantized",
        stored(c, codes),
        ids,
        stored_as(c, scales, c.result.dtype),
        packed_zeros(c, zeros, bits),
        domain=CONTRIB,
        bits=bits,
        block_size=codes.shape[1] * 8 // bits // scales.shape[1],
        gather_axis=0,
        quantize_axis=1,
    )
