"""Builds an ONNX graph node by node, with stable names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch
from onnx_ir.convenience import convert_attributes

from mla_deploy.sources import Read

Chunks = Callable[[Read], Iterator[torch.Tensor]]
"""Yields an initializer in order, piece by piece, reading from a checkpoint."""

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Initializer:
    """A weight of the graph: what it is, and how to make its bytes when they are wanted."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    chunks: Chunks

    @property
    def nbytes(self) -> int:
        """Size of its data in the external file."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)


class GraphBuilder:
    """Collects nodes.

    Nodes are named `/{scope}/{OpType}` after the module they stand for, with a number where a
    module has several of a kind, so that names do not move when something else changes.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, Initializer] = {}
        self.scope = ""
        self.symbols: dict[sympy.Symbol, tuple[ir.Value, int]] = {}
        """Where to find the extent that a symbol of the trace stands for."""
        self._values: dict[str, ir.Value] = {}
        self._names: set[str] = set()
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._extents: dict[sympy.Expr, ir.Value] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        overload: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node; gives its output, or a tuple of several."""
        name = self._unique(f"{self.scope}/{op_type}")
        node = ir.Node(
            domain,
            op_type,
            inputs,
            convert_attributes(attributes),
            overload=overload,
            num_outputs=outputs,
            name=name,
        )
        for index, output in enumerate(node.outputs):
            output.name = f"{name}/output_{index}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        """A small constant; equal ones are shared."""
        array = np.asarray(value, dtype=DTYPES[dtype].numpy())
        key = (array.tobytes(), array.shape, dtype)
        if key not in self._constants:
            scope, self.scope = self.scope, "/constants"
            self._constants[key] = self.op("Constant", value=ir.tensor(array))
            self.scope = scope
        return self._constants[key]

    def initializer(
        self, name: str, dtype: torch.dtype | ir.DataType, shape: Sequence[int], chunks: Chunks
    ) -> ir.Value:
        """A weight; asked for again under the same name, it is the same value.

        Args:
            dtype: ONNX's own for the types that torch does not have, such as INT4.
        """
        if name not in self.initializers:
            kind = DTYPES[dtype] if isinstance(dtype, torch.dtype) else dtype
            self.initializers[name] = Initializer(name, kind, tuple(shape), chunks)
            self._values[name] = ir.Value(
                name=name, shape=ir.Shape(shape), type=ir.TensorType(kind)
            )
        return self._values[name]

    def initializer_value(self, name: str) -> ir.Value:
        """The value of an initializer that was added."""
        return self._values[name]

    def input(
        self, name: str, dtype: torch.dtype | None, axes: Sequence[int | str] | None
    ) -> ir.Value:
        """A graph input; axes that vary are named."""
        shape = None if axes is None else ir.Shape(axes)
        kind = None if dtype is None else ir.TensorType(DTYPES[dtype])
        return ir.Value(name=name, shape=shape, type=kind)

    @contextmanager
    def own_symbols(self) -> Iterator[None]:
        """Emit another trace inside of one that is being emitted: their symbols are not related."""
        kept = self.symbols, self._extents, self.scope
        self.symbols, self._extents = {}, {}
        yield
        self.symbols, self._extents, self.scope = kept

    def extent(self, size: int | torch.SymInt) -> ir.Value:
        """An extent as int64 of shape [1]."""
        if isinstance(size, int):
            return self.constant([size])
        return self._extent(size.node.expr)

    def shape(self, sizes: Sequence[int | torch.SymInt]) -> ir.Value:
        """A shape as an int64 vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes))
        return self.op("Concat", *[self.extent(size) for size in sizes], axis=0)

    def _extent(self, expression: sympy.Expr) -> ir.Value:
        if expression not in self._extents:
            self._extents[expression] = self._compute_extent(expression)
        return self._extents[expression]

    def _compute_extent(self, expression: sympy.Expr) -> ir.Value:
        if expression.is_Integer:
            return self.constant([int(expression)])
        if expression.is_Symbol:
            value, axis = self.symbols[expression]
            return self.op("Shape", value, start=axis, end=axis + 1)
        name = {sympy.Mul: "Mul", sympy.Add: "Add"}[expression.func]
        total = self._extent(expression.args[0])
        for argument in expression.args[1:]:
            total = self.op(name, total, self._extent(argument))
        return total

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate
