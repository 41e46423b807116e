"""The decoder graph: prologue, layers, epilogue, each traced once a kind and lowered."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir
import torch
from torch import nn

from mla_deploy.cache import CachePart
from mla_deploy.config import MlaConfig
from mla_deploy.exporters.onnx.builder import GraphBuilder
from mla_deploy.exporters.onnx.translate import Table, Weight, translate
from mla_deploy.exporters.trace import TensorSpec, Trace, trace
from mla_deploy.families import family_of
from mla_deploy.model import cache_parts
from mla_deploy.modules.base import Block, parameter_sources
from mla_deploy.modules.decoder import DecoderLayer, Epilogue, Prologue
from mla_deploy.modules.mlp import Router
from mla_deploy.sources import Given

IR_VERSION = 11

Typed = TypeVar("Typed", bound=nn.Module)

SEQUENCE_INPUTS = {
    "input_ids": ("batch", "tokens"),
    "past_lengths": ("batch",),
    "new_lengths": ("batch",),
    "block_table": ("batch", "pages_per_sequence"),
    "logit_index": ("batch", "logits"),
}
"""The decoder's inputs beside the cache, all int64."""


class Target(abc.ABC):
    """How the decoder is spelled for one runtime: operators, types, and the form of the cache."""

    table: Table
    opset_imports: Mapping[str, int]
    functions: Sequence[ir.Function] = ()
    """Read when all layers are lowered."""
    dtype: torch.dtype = torch.float32
    """Of activations and of float matrices. In float32 stay routers, whose choices hang on small
    differences, and the sum that runs through all layers, which adds up their rounding."""
    batch: int | None = None
    """Sequences, where their number is fixed."""
    sequence_inputs: Sequence[str] = tuple(SEQUENCE_INPUTS)
    """Those of `SEQUENCE_INPUTS` that the graph has; lowerings must not ask for the others."""

    @abc.abstractmethod
    def cache_input(self, builder: GraphBuilder, layer: int, part: CachePart) -> ir.Value:
        """The graph input of one part of a layer's cache."""

    def cache_value(self, builder: GraphBuilder, value: ir.Value, part: CachePart) -> ir.Value:
        """What the layer is given for that input."""
        return value

    @abc.abstractmethod
    def cache_output(
        self, builder: GraphBuilder, value: ir.Value, layer: int, part: CachePart
    ) -> ir.Value:
        """The graph output of what the layer gave for that part."""


@dataclass(frozen=True)
class DecoderGraph:
    """A model whose weights are still to be written."""

    model: ir.Model
    builder: GraphBuilder


def build_graph(config: MlaConfig, target: Target) -> DecoderGraph:
    """Build the graph of a model, with the inputs and outputs that the target gives it.

    Its weights are named, and read when they are written: `check_weights` says beforehand whether a
    checkpoint has them.
    """
    builder = GraphBuilder()
    family = family_of(config.model_type, config.model_type)
    hidden = config.hidden_size
    int64 = torch.int64
    batch = target.batch or "B"
    inputs = [
        builder.input(
            name, int64, [target.batch or axis if axis == "batch" else axis for axis in axes]
        )
        for name, axes in SEQUENCE_INPUTS.items()
        if name in target.sequence_inputs
    ]
    values: dict[str, ir.Value | None] = dict.fromkeys(SEQUENCE_INPUTS)
    values |= {str(value.name): value for value in inputs}
    presents: list[ir.Value] = []

    prologue = Prologue(config)
    specs = [
        TensorSpec("input_ids", (batch, "S"), int64),
        TensorSpec("past_lengths", (batch,), int64),
    ]
    emit = _Emitter(builder, target)
    x, cos, sin = emit(trace(emit.typed(prologue), specs), prologue, values, "model")
    values |= {"cos": cos, "sin": sin, "x": x}

    traces: dict[tuple[object, ...], Trace] = {}
    for index, parts in enumerate(cache_parts(config)):
        layer = emit.typed(family.layer(config, index))
        kind = _kind(layer)
        if kind not in traces:
            traces[kind] = trace(layer, _layer_specs(layer, config, parts, target))
        scope = f"model.layers.{index}"
        builder.scope = f"/model/layers.{index}/cache"
        cache = {}
        for part in parts:
            inputs.append(target.cache_input(builder, index, part))
            cache[part.name] = target.cache_value(builder, inputs[-1], part)
        x, residual, *present = emit(traces[kind], layer, {**values, **cache}, scope)
        values |= {"x": x, "residual": residual}
        builder.scope = f"/model/layers.{index}/cache"
        for value, part in zip(present, parts, strict=True):
            presents.append(target.cache_output(builder, value, index, part))

    epilogue = emit.typed(Epilogue(config))
    specs = [
        TensorSpec("x", (batch, "S", hidden), target.dtype),
        TensorSpec("residual", (batch, "S", hidden)),
        TensorSpec("logit_index", (batch, "L"), int64),
    ]
    (logits,) = emit(trace(epilogue, specs), epilogue, values, "model")
    if target.dtype is not torch.float32:
        logits = builder.op("Cast", logits, to=ir.DataType.FLOAT.value)
    logits.name = "logits"
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape([target.batch or "batch", "logits", config.vocab_size])

    graph = ir.Graph(
        inputs,
        [logits, *presents],
        nodes=builder.nodes,
        initializers=[builder.initializer_value(name) for name in builder.initializers],
        opset_imports=dict(target.opset_imports),
        name="decoder",
    )
    model = ir.Model(
        graph, ir_version=IR_VERSION, producer_name="mla-deploy", functions=target.functions
    )
    return DecoderGraph(model, builder)


@dataclass(frozen=True)
class _Emitter:
    """Emits traces of modules into one graph."""

    builder: GraphBuilder
    target: Target

    def __call__(
        self, traced: Trace, module: nn.Module, values: Mapping[str, ir.Value | None], scope: str
    ) -> list[ir.Value]:
        weights = {}
        for name, parameter, source in parameter_sources(module):
            full_name = f"{scope}.{name}"
            weights[name] = Weight(full_name, tuple(parameter.shape), parameter.dtype, source)
        path = "/" + scope.replace(".", "/", 1)
        return translate(traced, self.builder, self.target.table, values, weights, path)

    def typed(self, module: Typed) -> Typed:
        """The module with its float32 parameters in the target's type, but for those of routers,
        and the frequencies of rotary positions, which are multiplied by large numbers."""
        for block in _blocks(module):
            for name, source in block.sources.items():
                parameter = block.get_parameter(name)
                stays = isinstance(block, Router) or isinstance(source, Given)
                if parameter.dtype is torch.float32 and not stays:
                    parameter.data = parameter.data.to(self.target.dtype)
        return module


def _kind(layer: DecoderLayer) -> tuple[object, ...]:
    """Layers of equal kind have the same trace."""
    parameters = [(name, tuple(p.shape), p.dtype) for name, p, _ in parameter_sources(layer)]
    return (layer.is_first, layer.self_attn.cache_format, *parameters)


def _layer_specs(
    layer: DecoderLayer, config: MlaConfig, parts: tuple[CachePart, ...], target: Target
) -> list[TensorSpec | list[TensorSpec] | None]:
    hidden, pairs = config.hidden_size, config.qk_rope_head_dim // 2
    batch = target.batch or "B"
    return [
        TensorSpec("x", (batch, "S", hidden), torch.float32 if layer.is_first else target.dtype),
        None if layer.is_first else TensorSpec("residual", (batch, "S", hidden)),
        TensorSpec("cos", (batch, "S", pairs)),
        TensorSpec("sin", (batch, "S", pairs)),
        TensorSpec("block_table", (batch, "M"), torch.int64),
        TensorSpec("past_lengths", (batch,), torch.int64),
        TensorSpec("new_lengths", (batch,), torch.int64),
        [TensorSpec(part.name, ("P", *part.page_shape), part.dtype) for part in parts],
    ]


def _blocks(module: nn.Module) -> Iterator[Block]:
    return (child for child in module.modules() if isinstance(child, Block))
