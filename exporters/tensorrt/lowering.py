"""Lowerings of the deployment ops for TensorRT without a plugin.

The only place, with `experts.py` and `attention.py`, that knows how TensorRT spells them. What a
version cannot parse is decomposed; `capability.py` says what it can.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.exporters.onnx import aten
from mla_deploy.exporters.onnx.aten import add_bias, stored
from mla_deploy.exporters.onnx.builder import DTYPES
from mla_deploy.exporters.onnx.translate import Context, Lowering, Table, Weight
from mla_deploy.exporters.onnx.weights import plain_chunks
from mla_deploy.exporters.tensorrt.attention import LatentAttentionLowering
from mla_deploy.exporters.tensorrt.capability import Capability
from mla_deploy.exporters.tensorrt.experts import lower_moe, lower_moe_quantized, swiglu
from mla_deploy.exporters.tensorrt.product import product
from mla_deploy.exporters.tensorrt.weights import (
    QuantizedWeight,
    table_code_chunks,
    table_correction_chunks,
    table_scale_chunks,
)

ops = torch.ops.mla_deploy
STORED_ONLY = (torch.uint8, torch.int8)
"""TensorRT has these at inputs and outputs only; in between the values are whole numbers in the
type of the activations, which holds all 256 of them in float16 and bfloat16 too."""


def table(capability: Capability, dtype: torch.dtype) -> Table:
    """The lowering table of a version, for activations of a type."""
    lowerings: dict[object, Lowering] = {
        **aten.TABLE,
        torch.ops.aten.to.dtype: functools.partial(_to, dtype),
        torch.ops.aten.__and__.Scalar: functools.partial(_low_bits, dtype),
        torch.ops.aten.__rshift__.Scalar: functools.partial(_shift_right, dtype),
        ops.swiglu.default: swiglu,
        ops.linear_quantized.default: _linear_quantized,
        ops.embedding_quantized.default: _embedding_quantized,
        ops.moe.default: lower_moe,
        ops.moe_quantized.default: lower_moe_quantized,
    }
    norm = _fused_norm if "RMSNormalization" in capability.operators else _decomposed_norm
    lowerings[ops.rms_norm.default] = functools.partial(_rms_norm, norm)
    lowerings[ops.add_rms_norm.default] = functools.partial(_add_rms_norm, norm)
    lowerings[ops.latent_attention.default] = LatentAttentionLowering(lowerings)
    return lowerings


def _to(carrier: torch.dtype, c: Context, x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Weight):
        x = stored(c, x)
    given, wanted = (carrier if one in STORED_ONLY else one for one in (c.fakes[0].dtype, dtype))
    return _cast(c, x, given, wanted)


def _low_bits(carrier: torch.dtype, c: Context, x: ir.Value, mask: int) -> ir.Value:
    """`x & mask` for a mask of the low bits."""
    assert mask & (mask + 1) == 0
    high = _shift_right(carrier, c, x, mask.bit_length())
    step = c.builder.constant(mask + 1, carrier)
    return c.builder.op("Sub", x, c.builder.op("Mul", high, step))


def _shift_right(carrier: torch.dtype, c: Context, x: ir.Value, bits: int) -> ir.Value:
    fraction = c.builder.constant(2.0**-bits, carrier)
    return c.builder.op("Floor", c.builder.op("Mul", x, fraction))


Norm = Callable[[Context, ir.Value, ir.Value, float], ir.Value]
"""Of a float32 value and a float32 weight."""


def _rms_norm(norm: Norm, c: Context, x: ir.Value, weight: Weight, epsilon: float) -> ir.Value:
    """In float32 inside, whatever goes in and comes out."""
    gamma = c.builder.initializer(
        weight.name, torch.float32, weight.shape, plain_chunks(weight.source, torch.float32)
    )
    normed = norm(c, _cast(c, x, c.fakes[0].dtype, torch.float32), gamma, epsilon)
    return _cast(c, normed, torch.float32, weight.dtype)


def _add_rms_norm(
    norm: Norm, c: Context, x: ir.Value, residual: ir.Value, weight: Weight, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    wide = _cast(c, x, c.fakes[0].dtype, c.fakes[1].dtype)
    total = c.builder.op("Add", wide, residual)
    return _rms_norm(norm, replace(c, fakes=c.fakes[1:]), total, weight, epsilon), total


def _fused_norm(c: Context, x: ir.Value, gamma: ir.Value, epsilon: float) -> ir.Value:
    return c.builder.op("RMSNormalization", x, gamma, axis=-1, epsilon=epsilon)


def _decomposed_norm(c: Context, x: ir.Value, gamma: ir.Value, epsilon: float) -> ir.Value:
    op, constant = c.builder.op, c.builder.constant
    mean = op("ReduceMean", op("Mul", x, x), constant([-1]), keepdims=1)
    deviation = op("Sqrt", op("Add", mean, constant(epsilon, torch.float32)))
    return op("Mul", op("Div", x, deviation), gamma)


def _cast(c: Context, x: ir.Value, given: torch.dtype, wanted: torch.dtype) -> ir.Value:
    return x if given is wanted else c.builder.op("Cast", x, to=DTYPES[wanted].value)


def _linear_quantized(
    c: Context,
    x: ir.Value,
    codes: Weight,
    scales: Weight,
    zeros: Weight,
    bias: Weight | None,
    bits: int,
) -> ir.Value:
    weight = QuantizedWeight(codes, scales, zeros, bits)
    return add_bias(c, product(c, x, weight, c.result.dtype), bias)


def _embedding_quantized(
    c: Context, ids: ir.Value, codes: Weight, scales: Weight, zeros: Weight, bits: int
) -> ir.Value:
    """Rows of the planes, and of the correction, which is the same along a group."""
    builder, dtype = c.builder, torch.float32
    rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
    groups = scales.shape[1]
    found: list[ir.Value] = []
    for plane in range(bits // 4):
        suffix = "" if bits == 4 else f".{('high', 'low')[plane]}"
        chunks = table_code_chunks(codes, bits, plane)
        code = builder.initializer(codes.name + suffix, ir.DataType.INT4, (rows, columns), chunks)
        chunks = table_scale_chunks(scales, bits, plane, dtype)
        scale = builder.initializer(scales.name + suffix, dtype, (rows, groups), chunks)
        table = builder.op("DequantizeLinear", code, scale, axis=1, block_size=columns // groups)
        found.append(builder.op("Gather", table, ids, axis=0))
    total = found[0] if len(found) == 1 else builder.op("Add", *found)
    chunks = table_correction_chunks(scales, zeros, bits, dtype)
    correction = builder.initializer(f"{zeros.name}.correction", dtype, (rows, groups), chunks)
    shift = builder.op("Gather", correction, ids, axis=0)  # [B, S, groups]
    grouped = builder.op("Reshape", total, builder.constant([0, 0, groups, -1]))
    shifted = builder.op("Add", grouped, builder.op("Unsqueeze", shift, builder.constant([-1])))
    return builder.op("Reshape", shifted, builder.constant([0, 0, -1]))
