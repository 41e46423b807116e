"""The routed experts without a plugin, one graph for one token and for many.

A list of experts is made, the same work is done for each of them, and what a token did not choose
counts nothing:

    one token:   the list is its top_k experts, and only their weights are read
    many tokens: the list is all experts

The list's length depends on the shape of the input alone, so each optimisation profile knows it,
and the weights are in the engine once.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from mla_deploy.exporters.onnx.builder import DTYPES
from mla_deploy.exporters.onnx.translate import Context, Weight
from mla_deploy.exporters.tensorrt.product import Pick, product
from mla_deploy.exporters.tensorrt.weights import (
    Arrange,
    QuantizedWeight,
    as_stored,
    dense_chunks,
    gate_then_up,
)

Multiply = Callable[[ir.Value, Pick], ir.Value]
"""[A, T, in] with the slabs picked of a stack [E, in, out], to [experts in the list, T, out]."""


def lower_moe(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: Weight,
    down: Weight,
    top_k: int,
) -> ir.Value:
    """`mla_deploy::moe`."""
    first, second = _dense(c, gate_up, gate_then_up), _dense(c, down, as_stored)
    return _experts(c, x, selection, weights, first, second, top_k)


def lower_moe_quantized(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: list[Weight],
    down: list[Weight],
    top_k: int,
    bits: int,
) -> ir.Value:
    """`mla_deploy::moe_quantized`."""
    first, second = (
        _quantized(c, QuantizedWeight(codes, scales, zeros, bits, arrange))
        for (codes, scales, zeros), arrange in ((gate_up, gate_then_up), (down, as_stored))
    )
    return _experts(c, x, selection, weights, first, second, top_k)


def _dense(c: Context, weight: Weight, arrange: Arrange) -> Multiply:
    experts, rows, columns = weight.shape
    chunks = dense_chunks(weight, arrange)
    name, shape = f"{weight.name}.transposed", (experts, columns, rows)

    def multiply(x: ir.Value, pick: Pick) -> ir.Value:
        matrix = c.builder.initializer(name, weight.dtype, shape, chunks)
        return c.builder.op("MatMul", x, pick(matrix))

    return multiply


def _quantized(c: Context, weight: QuantizedWeight) -> Multiply:
    return lambda x, pick: product(c, x, weight, c.result.dtype, pick)


def _experts(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: Multiply,
    down: Multiply,
    top_k: int,
) -> ir.Value:
    """Shapes: x [1, S, D], selection and weights [S, E], to [1, S, D]."""
    op, constant = c.builder.op, c.builder.constant
    experts = c.fakes[1].shape[1]
    _, chosen = op("TopK", selection, constant([top_k]), outputs=2, axis=-1)
    listed = _listed(c, selection, chosen, experts, top_k)

    def pick(stack: ir.Value) -> ir.Value:
        return op("Gather", stack, listed, axis=0)

    nothing = op("Expand", constant(0.0, torch.float32), op("Shape", weights))
    chosen_weights = op("GatherElements", weights, chosen, axis=1)
    share = op("ScatterElements", nothing, chosen, chosen_weights, axis=1)  # [S, E]
    share = op("Transpose", op("Gather", share, listed, axis=1), perm=[1, 0])
    share = op("Unsqueeze", share, constant([-1]))  # [listed, S, 1]
    if c.result.dtype is not torch.float32:
        share = op("Cast", share, to=DTYPES[c.result.dtype].value)
    hidden = swiglu(c, gate_up(x, pick))  # [listed, S, I]
    outputs = op("Mul", down(hidden, pick), share)
    return op("ReduceSum", outputs, constant([0]), keepdims=1)


def _listed(
    c: Context, selection: ir.Value, chosen: ir.Value, experts: int, top_k: int
) -> ir.Value:
    """The experts to compute: those chosen by the only token, or all."""
    op, constant = c.builder.op, c.builder.constant
    tokens = op("Shape", selection, start=0, end=1)
    is_one = op("Equal", tokens, constant([1]))
    first = op("Gather", chosen, constant(0), axis=0)  # [top_k]
    candidates = op("Concat", first, constant(list(range(experts))), axis=0)
    start = op("Where", is_one, constant([0]), constant([top_k]))
    end = op("Where", is_one, constant([top_k]), constant([top_k + experts]))
    return op("Slice", candidates, start, end, constant([0]))


def swiglu(c: Context, gate_up: ir.Value) -> ir.Value:
    """`silu(gate) * up` of [..., gate then up]."""
    op = c.builder.op
    gate, up = op("Split", gate_up, outputs=2, axis=-1, num_outputs=2)
    return op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
