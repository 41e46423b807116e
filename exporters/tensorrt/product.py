"""Products with quantised matrices: INT4 planes, and group sums of x for what they leave out."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from mla_deploy.exporters.onnx.translate import Context
from mla_deploy.exporters.tensorrt.weights import QuantizedWeight

Pick = Callable[[ir.Value], ir.Value]
"""Chooses slabs of a stack."""


def product(
    c: Context, x: ir.Value, weight: QuantizedWeight, dtype: torch.dtype, pick: Pick | None = None
) -> ir.Value:
    """`x @ W` for W [..., in, out].

    y = [x, x ...] @ DequantizeLinear(planes) + groupsum(x) @ correction

    Shapes: x [A, T, in]; to [A, T, out], or [slabs, T, out] of a stack.

    Args:
        dtype: of x and of the result.
        pick: of a stack, the slabs to multiply with. TensorRT moves the choice before the
            dequantisation, so that only what was chosen is read.
    """
    op, builder = c.builder.op, c.builder
    pick = pick or (lambda value: value)
    codes = builder.initializer(
        weight.codes.name,
        ir.DataType.INT4,
        weight.shape(weight.planes * weight.columns),
        weight.code_chunks,
    )
    scales = builder.initializer(
        weight.scales.name,
        dtype,
        weight.shape(weight.planes * weight.groups),
        weight.scale_chunks(dtype),
    )
    correction = builder.initializer(
        f"{weight.zeros.name}.correction",
        dtype,
        weight.shape(weight.groups),
        weight.correction_chunks(dtype),
    )
    axis = len(weight.codes.shape) - 2
    matrix = op("DequantizeLinear", codes, scales, axis=axis, block_size=weight.group)
    inputs = x if weight.planes == 1 else op("Concat", *[x] * weight.planes, axis=-1)
    grouped = op("Reshape", x, builder.constant([0, 0, -1, weight.group]))
    sums = op("ReduceSum", grouped, builder.constant([-1]), keepdims=0)
    return op("Add", op("MatMul", inputs, pick(matrix)), op("MatMul", sums, pick(correction)))
