"""Walks a trace and emits ONNX nodes through a lowering table."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from mla_deploy.exporters.onnx.builder import GraphBuilder
from mla_deploy.exporters.trace import Trace
from mla_deploy.sources import Source


@dataclass(frozen=True)
class Weight:
    """A parameter on its way into the graph; the lowering of its op decides how it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Source


@dataclass(frozen=True)
class Context:
    """What a lowering gets beside its arguments."""

    builder: GraphBuilder
    result: Any
    """The traced result: a fake tensor, or a tuple of them; its shape holds symbols."""
    fakes: tuple[Any, ...]
    """The traced arguments."""


Lowering = Callable[..., Any]
Table = Mapping[object, Lowering]


def translate(
    trace: Trace,
    builder: GraphBuilder,
    table: Table,
    inputs: Mapping[str, ir.Value | None],
    weights: Mapping[str, Weight],
    scope: str,
) -> list[ir.Value]:
    """Emit the nodes of a trace.

    Args:
        table: from torch op to the function that lowers it.
        inputs: by the names of the trace's inputs; None for one that no lowering asks for.
        weights: by the dotted names of the trace's parameters.
        scope: prefix of node names, such as `/model/layers.0`.

    Returns:
        The outputs, lists flattened.
    """
    values: dict[fx.Node, Any] = {}
    builder.symbols.clear()
    user_inputs = iter(trace.inputs)
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            if node.meta.get("val") is None:
                values[node] = None
                continue
            values[node] = _placeholder(node, trace, builder, inputs, weights, user_inputs)
            _note_symbols(builder, node, values[node])
        elif node.op == "call_function":
            builder.scope = scope + _module_path(node)
            values[node] = _call(node, builder, table, values)
        elif node.op == "output":
            return [values[result] for result in node.args[0]]
    raise AssertionError("a trace ends with its output")


def _placeholder(
    node: fx.Node,
    trace: Trace,
    builder: GraphBuilder,
    inputs: Mapping[str, ir.Value | None],
    weights: Mapping[str, Weight],
    user_inputs: Any,
) -> Any:
    if node.name in trace.parameters:
        return weights[trace.parameters[node.name]]
    if node.name in trace.buffers:
        value = trace.buffers[node.name]
        return builder.constant(value.numpy(), value.dtype)
    return inputs[next(user_inputs)]


def _note_symbols(builder: GraphBuilder, node: fx.Node, value: Any) -> None:
    fake = node.meta["val"]
    if isinstance(value, ir.Value) and isinstance(fake, torch.Tensor):
        for axis, size in enumerate(fake.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                builder.symbols.setdefault(size.node.expr, (value, axis))


def _call(node: fx.Node, builder: GraphBuilder, table: Table, values: dict[fx.Node, Any]) -> Any:
    if node.target is operator.getitem:
        source, index = node.args
        return values[source][index]  # type: ignore[index]
    if isinstance(node.meta.get("val"), (torch.SymInt, int)):
        return node.meta["val"]  # extents are found again through their symbols
    lower = table.get(node.target)
    if lower is None:
        raise NotImplementedError(
            f"no lowering for {node.target} in {_module_path(node) or 'the function body'}: "
            "add it to the table of this target"
        )
    context = Context(builder, node.meta.get("val"), fx.map_arg(node.args, _fake))
    return lower(context, *fx.map_arg(node.args, values.__getitem__), **node.kwargs)


def _fake(node: fx.Node) -> Any:
    return node.meta.get("val")


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return "/" + path.replace(".", "/") if path else ""


def flatten_values(values: Sequence[Any]) -> list[ir.Value]:
    """Values and lists of values as one list."""
    return [
        one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])
    ]
