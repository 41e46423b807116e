"""The decoder graph: prologue, layers, epilogue, each traced once a kind and lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn

from mla_deploy.cache import CachePart
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.exporters.onnx import ort
from mla_deploy.exporters.onnx.attention_function import (
    ATTENTION_DOMAIN,
    OPSET,
    AttentionFunctions,
)
from mla_deploy.exporters.onnx.builder import DTYPES, GraphBuilder
from mla_deploy.exporters.onnx.translate import Table, Weight, translate
from mla_deploy.exporters.trace import TensorSpec, Trace, trace
from mla_deploy.families import family_of
from mla_deploy.model import cache_parts
from mla_deploy.modules.base import parameter_sources
from mla_deploy.modules.decoder import DecoderLayer, Epilogue, Prologue

IR_VERSION = 11

IR_VERSION = 11


@dataclass(frozen=True)
class DecoderGraph:
    """A model whose weights are still to be written."""

    model: ir.Model
    builder: GraphBuilder


def build_graph(config: MlaConfig, checkpoint: Checkpoint) -> DecoderGraph:
    """Build the graph that `mla_deploy.bundle` describes.

    Every tensor is looked up in the checkpoint's headers first, so that what is missing is reported
    before anything is written.
    """
    builder, functions = GraphBuilder(), AttentionFunctions()
    table = ort.table(functions)
    family = family_of(config.model_type, str(checkpoint.path))
    hidden = config.hidden_size
    int64 = torch.int64
    values = {
        name: builder.input(name, int64, axes)
        for name, axes in (
            ("input_ids", ("batch", "tokens")),
            ("past_lengths", ("batch",)),
            ("new_lengths", ("batch",)),
            ("block_table", ("batch", "pages_per_sequence")),
            ("logit_index", ("batch", "logits")),
        )
    }
    inputs = list(values.values())
    presents: list[ir.Value] = []

    prologue = Prologue(config)
    specs = [TensorSpec("input_ids", ("B", "S"), int64), TensorSpec("past_lengths", ("B",), int64)]
    x, cos, sin = _emit(
        trace(prologue, specs), prologue, builder, table, values, "model", checkpoint
    )
    values |= {"cos": cos, "sin": sin, "x": x}

    traces: dict[tuple[object, ...], Trace] = {}
    for index, parts in enumerate(cache_parts(config)):
        layer = family.layer(config, index)
        kind = _kind(layer)
        if kind not in traces:
            traces[kind] = trace(layer, _layer_specs(layer, hidden, config, parts))
        cache = {
            part.name: builder.input(
                f"cache.{index}.{part.name}", part.dtype, ("pages", *part.page_shape)
            )
            for part in parts
        }
        inputs += cache.values()
        scope = f"model.layers.{index}"
        x, residual, *present = _emit(
            traces[kind], layer, builder, table, {**values, **cache}, scope, checkpoint
        )
        values |= {"x": x, "residual": residual}
        presents += _name_outputs(present, index, parts)

    epilogue = Epilogue(config)
    specs = [
        TensorSpec("x", ("B", "S", hidden)),
        TensorSpec("residual", ("B", "S", hidden)),
        TensorSpec("logit_index", ("B", "L"), int64),
    ]
    (logits,) = _emit(trace(epilogue, specs), epilogue, builder, table, values, "model", checkpoint)
    logits.name = "logits"
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "logits", config.vocab_size])

    graph = ir.Graph(
        inputs,
        [logits, *presents],
        nodes=builder.nodes,
        initializers=[builder.initializer_value(name) for name in builder.initializers],
        opset_imports={"": OPSET, ort.CONTRIB: 1, ATTENTION_DOMAIN: 1},
        name="decoder",
    )
    model = ir.Model(
        graph, ir_version=IR_VERSION, producer_name="mla-deploy", functions=functions.functions
    )
    return DecoderGraph(model, builder)


def _emit(
    traced: Trace,
    module: nn.Module,
    builder: GraphBuilder,
    table: Table,
    values: Mapping[str, ir.Value],
    scope: str,
    checkpoint: Checkpoint,
) -> list[ir.Value]:
    weights = {}
    for name, parameter, source in parameter_sources(module):
        checkpoint.check(source.tensors())
        full_name = f"{scope}.{name}"
        weights[name] = Weight(full_name, tuple(parameter.shape), parameter.dtype, source)
    return translate(traced, builder, table, values, weights, "/" + scope.replace(".", "/", 1))


def _kind(layer: DecoderLayer) -> tuple[object, ...]:
    """Layers of equal kind have the same trace."""
    parameters = [(name, tuple(p.shape), p.dtype) for name, p, _ in parameter_sources(layer)]
    return (layer.is_first, layer.self_attn.cache_format, *parameters)


def _layer_specs(
    layer: DecoderLayer, hidden: int, config: MlaConfig, parts: tuple[CachePart, ...]
) -> list[TensorSpec | list[TensorSpec] | None]:
    pairs = config.qk_rope_head_dim // 2
    return [
        TensorSpec("x", ("B", "S", hidden)),
        None if layer.is_first else TensorSpec("residual", ("B", "S", hidden)),
        TensorSpec("cos", ("B", "S", pairs)),
        TensorSpec("sin", ("B", "S", pairs)),
        TensorSpec("block_table", ("B", "M"), torch.int64),
        TensorSpec("past_lengths", ("B",), torch.int64),
        TensorSpec("new_lengths", ("B",), torch.int64),
        [TensorSpec(part.name, ("P", *part.page_shape), part.dtype) for part in parts],
    ]


def _name_outputs(
    present: list[ir.Value], layer: int, parts: tuple[CachePart, ...]
) -> list[ir.Value]:
    for value, part in zip(present, parts, strict=True):
        value.name = f"present.{layer}.{part.name}"
        value.type = ir.TensorType(DTYPES[part.dtype])
        value.shape = ir.Shape(["pages", *part.page_shape])
    return present
