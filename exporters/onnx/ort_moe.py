"""Lowerings of the routed experts for ONNX Runtime: MoE and QMoE.

Experts and their weights are chosen before. MoE, and QMoE on a GPU, can be told these only as the
logits of a softmax. They get the logarithm of each chosen weight, over the largest one, and for the
rest something so small that the softmax makes it zero. So the weights that come out add up to one,
and the output is multiplied by what they added up to before.

    selection, weights [T, E] -- TopK, GatherElements --> [T, K] -- ReduceSum --> [T, 1]
                                        |                                            |
                        Log, ScatterElements: logits [T, E]                          |
                                        |                                            |
    x ----------------------------- MoE, QMoE ------------------------------------- Mul
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.exporters.onnx.aten import stored
from mla_deploy.exporters.onnx.ort_weights import (
    ACCURACY_LEVEL,
    CONTRIB,
    cast,
    packed_zeros,
    require_whole_zeros,
    stored_as,
)
from mla_deploy.exporters.onnx.translate import Context, Weight

NOT_CHOSEN = -1e4
"""A logit that float16 holds and whose exponential is zero. Not an infinity: a search for the
largest may start from one and then find nothing."""
LEAST_WEIGHT = 1e-30

_SWIGLU: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_limit": float("inf"),  # versions differ in what they take for granted
}


def moe(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: Weight,
    down: Weight,
    top_k: int,
) -> ir.Value:
    """`mla_deploy::moe`."""
    logits, total = _as_logits(c, selection, weights, top_k)
    normalised = c.builder.op(
        "MoE",
        x,
        logits,
        stored(c, gate_up),
        None,
        stored(c, down),
        domain=CONTRIB,
        k=top_k,
        **_SWIGLU,
    )
    return c.builder.op("Mul", normalised, total)


def moe_quantized(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: list[Weight],
    down: list[Weight],
    top_k: int,
    bits: int,
) -> ir.Value:
    """`mla_deploy::moe_quantized` where QMoE takes the weights: on the CPU."""
    return _qmoe(c, x, selection, weights, gate_up, down, top_k, bits)


def moe_quantized_by_logits(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: list[Weight],
    down: list[Weight],
    top_k: int,
    bits: int,
) -> ir.Value:
    """`mla_deploy::moe_quantized` where QMoE takes no weights: on a GPU."""
    logits, total = _as_logits(c, selection, weights, top_k)
    normalised = _qmoe(c, x, logits, None, gate_up, down, top_k, bits)
    return c.builder.op("Mul", normalised, total)


def _as_logits(
    c: Context, selection: ir.Value, weights: ir.Value, top_k: int
) -> tuple[ir.Value, ir.Value]:
    """Logits [T, E], and what the chosen weights add up to, [B, S, 1], both in the type of x."""
    op, constant = c.builder.op, c.builder.constant
    dtype = c.result.dtype
    last = constant([-1])
    _, chosen = op("TopK", selection, constant([top_k]), outputs=2, axis=-1)
    chosen_weights = op("GatherElements", weights, chosen, axis=1)
    largest = op("ReduceMax", chosen_weights, last, keepdims=1)
    relative = op("Div", chosen_weights, largest)  # rounding is finest near the logit 0
    logarithm = op("Log", op("Max", relative, constant(LEAST_WEIGHT, torch.float32)))
    others = op("Expand", constant(NOT_CHOSEN, torch.float32), op("Shape", weights))
    logits = op("ScatterElements", others, chosen, logarithm, axis=1)
    total = op("ReduceSum", chosen_weights, last, keepdims=1)  # [T, 1]
    by_token = op("Reshape", total, c.builder.shape([*c.result.shape[:2], 1]))
    return cast(c, logits, torch.float32, dtype), cast(c, by_token, torch.float32, dtype)


def _qmoe(
    c: Context,
    x: ir.Value,
    router: ir.Value,
    weights: ir.Value | None,
    gate_up: list[Weight],
    down: list[Weight],
    top_k: int,
    bits: int,
) -> ir.Value:
    require_whole_zeros(gate_up[2])
    dtype = c.result.dtype
    group = gate_up[0].shape[2] * 8 // bits // gate_up[1].shape[2]
    first, second = (
        (stored(c, codes), stored_as(c, scales, dtype), packed_zeros(c, zeros, bits))
        for codes, scales, zeros in (gate_up, down)
    )
    no_third = (None, None, None)
    operands = [
        *(x, router),
        *(first[0], first[1], None),
        *(second[0], second[1], None),
        *no_third,
        *(first[2], second[2], None),
    ]
    attributes = dict(_SWIGLU)
    if ACCURACY_LEVEL[dtype]:  # onnxruntime 1.28 and 1.29 do not know it
        attributes["accuracy_level"] = ACCURACY_LEVEL[dtype]
    return c.builder.op(
        "QMoE",
        *operands,
        *([] if weights is None else [weights]),
        domain=CONTRIB,
        k=top_k,
        normalize_routing_weights=0,
        expert_weight_bits=bits,
        block_size=group,
        weights_prepacked=0,
        **attributes,
    )
