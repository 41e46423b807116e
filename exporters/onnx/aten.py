"""Lowerings of plain torch ops to standard ONNX operators, opset 24."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.exporters.onnx.builder import DTYPES
from mla_deploy.exporters.onnx.translate import Context, Lowering, Weight
from mla_deploy.exporters.onnx.weights import plain_chunks, transposed_chunks

aten = torch.ops.aten
Number = int | float | bool

TABLE: dict[object, Lowering] = {}


def lowers(*targets: object) -> Callable[[Lowering], Lowering]:
    """Enter a function into the table."""

    def enter(function: Lowering) -> Lowering:
        TABLE.update(dict.fromkeys(targets, function))
        return function

    return enter


def as_value(c: Context, value: Any, dtype: torch.dtype) -> ir.Value:
    """An operand: a value as it is, a weight stored as it is, a number as a constant, an extent as
    the int64 it is at run time."""
    if isinstance(value, ir.Value):
        return value
    if isinstance(value, torch.SymInt):
        return c.builder.extent(value)
    if isinstance(value, Weight):
        return stored(c, value)
    return c.builder.constant(value, dtype)


def stored(c: Context, weight: Weight) -> ir.Value:
    """A weight as an initializer in its own type and layout."""
    return c.builder.initializer(
        weight.name, weight.dtype, weight.shape, plain_chunks(weight.source, weight.dtype)
    )


def _binary(op_type: str, *targets: object) -> None:
    def lower(c: Context, a: Any, b: Any) -> ir.Value:
        operand = next(f.dtype for f in c.fakes if isinstance(f, torch.Tensor))
        dtype = c.result.dtype if c.result.dtype is not torch.bool else operand
        return c.builder.op(op_type, as_value(c, a, dtype), as_value(c, b, dtype))

    lowers(*targets)(lower)


def _unary(op_type: str, *targets: object) -> None:
    lowers(*targets)(lambda c, x: c.builder.op(op_type, x))


_binary("Add", aten.add.Tensor, aten.add.Scalar)
_binary("Sub", aten.sub.Tensor, aten.sub.Scalar)
_binary("Mul", aten.mul.Tensor, aten.mul.Scalar)
_binary("Div", aten.div.Tensor, aten.floor_divide.default)  # floor: of what is never negative here
_binary("Mod", aten.remainder.Scalar)
_binary("Less", aten.lt.Tensor, aten.lt.Scalar)
_binary("LessOrEqual", aten.le.Tensor, aten.le.Scalar)
_binary("Greater", aten.gt.Tensor, aten.gt.Scalar)
_binary("GreaterOrEqual", aten.ge.Scalar)
_binary("BitwiseAnd", aten.__and__.Scalar)
_binary("MatMul", aten.matmul.default)
_unary("Abs", aten.abs.default)
_unary("Cos", aten.cos.default)
_unary("Sin", aten.sin.default)
_unary("Reciprocal", aten.reciprocal.default)
_unary("Round", aten.round.default)  # both round half to even
_unary("Sigmoid", aten.sigmoid.default)


@lowers(aten._assert_tensor_metadata.default)
def _nothing(c: Context, *args: Any, **kwargs: Any) -> None:
    return None


@lowers(aten.rsqrt.default)
def _rsqrt(c: Context, x: ir.Value) -> ir.Value:
    return c.builder.op("Reciprocal", c.builder.op("Sqrt", x))


@lowers(aten.__rshift__.Scalar)
def _shift_right(c: Context, x: ir.Value, bits: int) -> ir.Value:
    amount = c.builder.constant(bits, c.result.dtype)
    return c.builder.op("BitShift", x, amount, direction="RIGHT")


@lowers(aten.clamp.default)
def _clamp(c: Context, x: ir.Value, low: Number, high: Number) -> ir.Value:
    dtype = c.result.dtype
    return c.builder.op("Clip", x, c.builder.constant(low, dtype), c.builder.constant(high, dtype))


@lowers(aten.clamp_min.default)
def _clamp_min(c: Context, x: ir.Value, low: Number) -> ir.Value:
    return c.builder.op("Clip", x, c.builder.constant(low, c.result.dtype))


@lowers(aten.to.dtype)
def _to(c: Context, x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Weight):
        x = stored(c, x)
    return x if c.fakes[0].dtype is dtype else c.builder.op("Cast", x, to=DTYPES[dtype].value)


@lowers(aten.where.self, aten.where.ScalarOther)
def _where(c: Context, condition: ir.Value, a: Any, b: Any) -> ir.Value:
    dtype = c.result.dtype
    return c.builder.op("Where", condition, as_value(c, a, dtype), as_value(c, b, dtype))


@lowers(aten.zeros_like.default)
def _zeros_like(c: Context, x: ir.Value, **_: Any) -> ir.Value:
    return c.builder.op("Expand", c.builder.constant(0, c.result.dtype), c.builder.op("Shape", x))


@lowers(aten.arange.default)
def _arange(c: Context, end: Any, **_: Any) -> ir.Value:
    if isinstance(end, int):
        return c.builder.constant(list(range(end)))
    scalar = c.builder.op("Squeeze", c.builder.extent(end), c.builder.constant([0]))
    return c.builder.op("Range", c.builder.constant(0), scalar, c.builder.constant(1))


def _reduce(op_type: str, *targets: object) -> None:
    def lower(c: Context, x: ir.Value, dims: Any = (), keepdim: bool = False) -> ir.Value:
        axes = c.builder.constant([dims] if isinstance(dims, int) else list(dims))
        return c.builder.op(op_type, x, axes, keepdims=int(keepdim))

    lowers(*targets)(lower)


_reduce("ReduceMean", aten.mean.dim)
_reduce("ReduceSum", aten.sum.dim_IntList)
_reduce("ReduceMax", aten.amax.default)
_reduce("ReduceMin", aten.amin.default)


@lowers(aten.softmax.int)
def _softmax(c: Context, x: ir.Value, dim: int) -> ir.Value:
    return c.builder.op("Softmax", x, axis=dim)


@lowers(aten.topk.default)
def _topk(c: Context, x: ir.Value, k: int, dim: int = -1) -> tuple[ir.Value, ir.Value]:
    values, indices = c.builder.op("TopK", x, c.builder.constant([k]), outputs=2, axis=dim)
    return values, indices


@lowers(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int)
def _reshape(c: Context, x: ir.Value, *_: Any) -> ir.Value:
    """With 0 for axes that keep their place and -1 for one that does not, if that suffices."""
    before, after = c.fakes[0].shape, c.result.shape
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before) and before[axis] is not None and _same(before[axis], size):
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) <= 1:
        return c.builder.op("Reshape", x, c.builder.constant(target))
    return c.builder.op("Reshape", x, c.builder.shape(after))


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, torch.SymInt) and bool(a.node.expr == b.node.expr)


@lowers(aten.unsqueeze.default)
def _unsqueeze(c: Context, x: ir.Value, dim: int) -> ir.Value:
    return c.builder.op("Unsqueeze", x, c.builder.constant([dim]))


@lowers(aten.expand.default)
def _expand(c: Context, x: ir.Value, sizes: Sequence[Any]) -> ir.Value:
    kept = [1 if size == -1 else size for size in sizes]  # ONNX: 1 leaves an axis as it is
    return c.builder.op("Expand", x, c.builder.shape(kept))


@lowers(aten.permute.default)
def _permute(c: Context, x: ir.Value, dims: Sequence[int]) -> ir.Value:
    return c.builder.op("Transpose", x, perm=list(dims))


@lowers(aten.transpose.int)
def _transpose(c: Context, x: ir.Value, a: int, b: int) -> ir.Value:
    order = list(range(c.result.dim()))
    order[a], order[b] = order[b], order[a]
    return c.builder.op("Transpose", x, perm=order)


@lowers(aten.stack.default)
def _stack(c: Context, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    axis = c.builder.constant([dim])
    return c.builder.op("Concat", *[c.builder.op("Unsqueeze", p, axis) for p in parts], axis=dim)


@lowers(aten.cat.default)
def _cat(c: Context, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    return c.builder.op("Concat", *parts, axis=dim)


@lowers(aten.slice.Tensor)
def _slice(c: Context, x: ir.Value, dim: int = 0, start: int = 0, end: int = 0) -> ir.Value:
    if start == 0 and end == torch.iinfo(torch.int64).max:
        return x
    bounds = [c.builder.constant([bound]) for bound in (start, end, dim)]
    return c.builder.op("Slice", x, *bounds)


@lowers(aten.select.int)
def _select(c: Context, x: ir.Value, dim: int, index: int) -> ir.Value:
    return c.builder.op("Gather", x, c.builder.constant(index), axis=dim)


@lowers(aten.split_with_sizes.default)
def _split(c: Context, x: ir.Value, sizes: Sequence[int], dim: int = 0) -> Any:
    lengths = c.builder.constant(list(sizes))
    return c.builder.op("Split", x, lengths, outputs=len(sizes), axis=dim)


@lowers(aten.gather.default)
def _gather(c: Context, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    return c.builder.op("GatherElements", x, index, axis=dim)


@lowers(aten.index_select.default)
def _index_select(c: Context, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    return c.builder.op("Gather", x, index, axis=dim)


@lowers(aten.scatter.value)
def _scatter(c: Context, x: ir.Value, dim: int, index: ir.Value, value: Number) -> ir.Value:
    updates = c.builder.op(
        "Expand", c.builder.constant(value, c.result.dtype), c.builder.op("Shape", index)
    )
    return c.builder.op("ScatterElements", x, index, updates, axis=dim)


@lowers(aten.index.Tensor)
def _index(c: Context, x: ir.Value, indices: Sequence[ir.Value]) -> ir.Value:
    if len(indices) == 1:
        return c.builder.op("Gather", x, indices[0], axis=0)
    return c.builder.op("GatherND", x, _joined_indices(c, indices))


@lowers(aten.index_put.default)
def _index_put(c: Context, x: ir.Value, indices: Sequence[ir.Value], values: ir.Value) -> ir.Value:
    return c.builder.op("ScatterND", x, _joined_indices(c, indices), values)


def _joined_indices(c: Context, indices: Sequence[ir.Value]) -> ir.Value:
    """Index tensors that broadcast against each other, as the last axis of one."""
    shapes = [fake.shape for fake in c.fakes[1]]
    rank = max(len(shape) for shape in shapes)
    common: list[Any] = []
    for axis in range(rank):
        sizes = [shape[axis - rank] for shape in shapes if len(shape) >= rank - axis]
        common.append(next((size for size in sizes if not _is_one(size)), 1))
    target = c.builder.shape(common)
    last = c.builder.constant([-1])
    expanded = [
        c.builder.op("Unsqueeze", c.builder.op("Expand", index, target), last) for index in indices
    ]
    return c.builder.op("Concat", *expanded, axis=-1)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@lowers(aten.embedding.default)
def _embedding(c: Context, table: Weight, ids: ir.Value) -> ir.Value:
    return c.builder.op("Gather", stored(c, table), ids, axis=0)


@lowers(aten.linear.default)
def _linear(c: Context, x: ir.Value, weight: Weight, bias: Weight | None = None) -> ir.Value:
    """MatMul wants the matrix as [in, out]."""
    name, shape = f"{weight.name}.transposed", weight.shape[::-1]
    chunks = transposed_chunks(weight.source, weight.dtype)
    matrix = c.builder.initializer(name, weight.dtype, shape, chunks)
    return add_bias(c, c.builder.op("MatMul", x, matrix), bias)


def add_bias(c: Context, x: ir.Value, bias: Weight | None) -> ir.Value:
    """`x + bias`, or x where there is none."""
    return x if bias is None else c.builder.op("Add", x, stored(c, bias))
