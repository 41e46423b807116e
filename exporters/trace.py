"""From a reference module to a flat graph of deployment ops and plain torch ops.

Modules are traced on the meta device with torch.export: no weight is touched, and a layer takes a
second or two whatever its size. The same trace is lowered to every target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, export
from torch.export.graph_signature import InputKind, TensorArgument


@dataclass(frozen=True)
class TensorSpec:
    """An input of a trace: names for the axes that vary, numbers for those that do not."""

    name: str
    axes: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


Spec = TensorSpec | list[TensorSpec] | None


@dataclass(frozen=True)
class Trace:
    """A traced module."""

    graph: fx.Graph
    inputs: tuple[str, ...]
    """Names of the user inputs, lists flattened, in the order of their placeholders."""
    parameters: dict[str, str]
    """From placeholder to the dotted name of the parameter or buffer behind it."""
    buffers: dict[str, torch.Tensor]
    """Values of buffers and constants, by placeholder."""


def trace(module: nn.Module, specs: Sequence[Spec]) -> Trace:
    """Trace a module; it is left on the meta device, without storage."""
    dims: dict[str, Any] = {}
    arguments = [_map(spec, _example) for spec in specs]
    shapes = [_map(spec, lambda one: _dynamic_axes(one, dims)) for spec in specs]
    buffers = dict(module.named_buffers())
    with torch.device("meta"):
        program = export(
            module.to("meta"), tuple(arguments), dynamic_shapes=tuple(shapes), strict=False
        )
    parameters, values, user = {}, {}, []
    for one in program.graph_signature.input_specs:
        assert isinstance(one.arg, TensorArgument) or one.kind is InputKind.USER_INPUT
        if one.kind is InputKind.PARAMETER:
            parameters[one.arg.name] = str(one.target)
        elif one.kind is InputKind.BUFFER:
            values[one.arg.name] = buffers[str(one.target)]
        elif isinstance(one.arg, TensorArgument):
            user.append(one.arg.name)
    names = [one.name for spec in specs for one in _flat(spec)]
    return Trace(program.graph, tuple(names), parameters, values)


def _flat(spec: Spec) -> list[TensorSpec]:
    if spec is None:
        return []
    return spec if isinstance(spec, list) else [spec]


def _map(spec: Spec, function: Callable[[TensorSpec], Any]) -> Any:
    if spec is None:
        return None
    if isinstance(spec, list):
        return [function(one) for one in spec]
    return function(spec)


def _example(spec: TensorSpec) -> torch.Tensor:
    """A tensor with a distinct extent for every varying axis, so that none are taken for equal."""
    names = "BSMPL"
    shape = [3 + 4 * names.index(axis) if isinstance(axis, str) else axis for axis in spec.axes]
    return torch.empty(shape, dtype=spec.dtype, device="meta")


def _dynamic_axes(spec: TensorSpec, dims: dict[str, Any]) -> dict[int, Any]:
    return {
        index: dims.setdefault(axis, Dim(axis))
        for index, axis in enumerate(spec.axes)
        if isinstance(axis, str)
    }
