"""Lowerings of the deployment ops for ONNX Runtime, table `ort1.22`.

The only place that knows how ONNX Runtime spells them. Operators of the domain `com.microsoft` are
described in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.cache import CachePart
from mla_deploy.errors import ConfigError
from mla_deploy.exporters.onnx import aten
from mla_deploy.exporters.onnx.aten import add_bias, stored
from mla_deploy.exporters.onnx.attention_function import (
    ATTENTION_DOMAIN,
    OPSET,
    AttentionFunctions,
)
from mla_deploy.exporters.onnx.builder import DTYPES, GraphBuilder
from mla_deploy.exporters.onnx.graph import Target
from mla_deploy.exporters.onnx.translate import Context, Lowering, Table, Weight
from mla_deploy.exporters.onnx.weights import (
    exact_zero_chunks,
    packed_zero_chunks,
    plain_chunks,
)

NAME = "ort1.22"
CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4
"""`accuracy_level` of products with quantised matrices: activations are rounded to int8 a group,
which adds 4e-3 to 8e-3 relative error and runs at the speed of memory."""

ops = torch.ops.mla_deploy


class OnnxRuntime(Target):
    """The graph that `mla_deploy.bundle` describes: a paged cache, meant to be written in place."""

    opset_imports: Mapping[str, int] = {"": OPSET, CONTRIB: 1, ATTENTION_DOMAIN: 1}

    def __init__(self) -> None:
        attention = AttentionFunctions()
        self.table = table(attention)
        self.functions = attention.functions

    def cache_input(self, builder: GraphBuilder, layer: int, part: CachePart) -> ir.Value:
        name = f"cache.{layer}.{part.name}"
        return builder.input(name, part.dtype, ("pages", *part.page_shape))

    def cache_output(
        self, builder: GraphBuilder, value: ir.Value, layer: int, part: CachePart
    ) -> ir.Value:
        value.name = f"present.{layer}.{part.name}"
        value.type = ir.TensorType(DTYPES[part.dtype])
        value.shape = ir.Shape(["pages", *part.page_shape])
        return value


def table(functions: AttentionFunctions) -> Table:
    """The lowering table; attention bodies that come up are added to `functions`."""
    lowerings: dict[object, Lowering] = {
        **aten.TABLE,
        ops.rms_norm.default: _rms_norm,
        ops.add_rms_norm.default: _add_rms_norm,
        ops.swiglu.default: _swiglu,
        ops.linear_quantized.default: _linear_quantized,
        ops.embedding_quantized.default: _embedding_quantized,
        ops.moe.default: _moe,
        ops.moe_quantized.default: _moe_quantized,
    }

    def latent_attention(c: Context, *arguments: Any) -> Any:
        return _latent_attention(c, functions, *arguments)

    lowerings[ops.latent_attention.default] = latent_attention
    return lowerings


def _rms_norm(c: Context, x: ir.Value, weight: Weight, epsilon: float) -> ir.Value:
    return c.builder.op("RMSNormalization", x, stored(c, weight), axis=-1, epsilon=epsilon)


def _add_rms_norm(
    c: Context, x: ir.Value, residual: ir.Value, weight: Weight, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    normed, mean, deviation, total = c.builder.op(
        "SkipSimplifiedLayerNormalization",
        x,
        residual,
        stored(c, weight),
        domain=CONTRIB,
        outputs=4,
        epsilon=epsilon,
    )
    mean.name = deviation.name = ""  # not wanted
    return normed, total


def _swiglu(c: Context, gate_up: ir.Value) -> ir.Value:
    gate, up = c.builder.op("Split", gate_up, outputs=2, axis=-1, num_outputs=2)
    # QuickGelu is x * sigmoid(alpha * x), and with alpha 1 that is SiLU in one pass.
    return c.builder.op("Mul", c.builder.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)


def _linear_quantized(
    c: Context,
    x: ir.Value,
    codes: Weight,
    scales: Weight,
    zeros: Weight,
    bias: Weight | None,
    bits: int,
) -> ir.Value:
    """MatMulNBits. Exact zeros become a product with the group sums of x:

    y = MatMulNBits_symmetric(x) + groupsum(x) @ ((2^(bits-1) - zero) * scale)^T
    """
    rows, columns = codes.shape[0], codes.shape[1] * 8 // bits
    group = columns // scales.shape[1]
    attributes: dict[str, Any] = {
        "K": columns,
        "N": rows,
        "bits": bits,
        "block_size": group,
        "accuracy_level": INT8_ACTIVATIONS,
        "domain": CONTRIB,
    }
    operands = [
        c.builder.initializer(
            codes.name,
            torch.uint8,
            (rows, columns // group, group * bits // 8),
            plain_chunks(codes.source, torch.uint8),
        ),
        _float_scales(c, scales),
    ]
    if zeros.dtype is torch.uint8:
        operands.append(_packed_zeros(c, zeros, bits))
        y = c.builder.op("MatMulNBits", x, *operands, **attributes)
    else:
        symmetric = c.builder.op("MatMulNBits", x, *operands, **attributes)
        correction = c.builder.initializer(
            f"{zeros.name}.correction",
            torch.float32,
            zeros.shape[::-1],
            exact_zero_chunks(scales.source, zeros.source, bits),
        )
        grouped = c.builder.op("Reshape", x, c.builder.constant([0, 0, -1, group]))
        sums = c.builder.op("ReduceSum", grouped, c.builder.constant([-1]), keepdims=0)
        y = c.builder.op("Add", symmetric, c.builder.op("MatMul", sums, correction))
    return add_bias(c, y, bias)


def _embedding_quantized(
    c: Context, ids: ir.Value, codes: Weight, scales: Weight, zeros: Weight, bits: int
) -> ir.Value:
    _require_whole_zeros(zeros)
    return c.builder.op(
        "GatherBlockQuantized",
        stored(c, codes),
        ids,
        _float_scales(c, scales),
        _packed_zeros(c, zeros, bits),
        domain=CONTRIB,
        bits=bits,
        block_size=codes.shape[1] * 8 // bits // scales.shape[1],
        gather_axis=0,
        quantize_axis=1,
    )


def _moe(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: Weight,
    down: Weight,
    top_k: int,
) -> ir.Value:
    """MoE takes no weights, only logits of a softmax over the chosen experts.

    It gets `log(weight)` of the chosen and -inf for the rest, so that the softmax gives weights
    that add up to one, and the output is multiplied by what they added up to before.
    """
    op = c.builder.op
    _, chosen = op("TopK", selection, c.builder.constant([top_k]), outputs=2, axis=-1)
    chosen_weights = op("GatherElements", weights, chosen, axis=1)
    nothing = op("Expand", c.builder.constant(0.0, torch.float32), op("Shape", weights))
    logits = op("Log", op("ScatterElements", nothing, chosen, chosen_weights, axis=1))
    normalised = op(
        "MoE",
        x,
        logits,
        stored(c, gate_up),
        None,
        stored(c, down),
        domain=CONTRIB,
        k=top_k,
        **_SWIGLU_ATTRIBUTES,
    )
    total = op("ReduceSum", chosen_weights, c.builder.constant([-1]), keepdims=1)  # [T, 1]
    by_token = c.builder.shape([*c.result.shape[:2], 1])
    return op("Mul", normalised, op("Reshape", total, by_token))


def _moe_quantized(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: list[Weight],
    down: list[Weight],
    top_k: int,
    bits: int,
) -> ir.Value:
    _require_whole_zeros(gate_up[2])
    group = gate_up[0].shape[2] * 8 // bits // gate_up[1].shape[2]
    first, second = (
        (stored(c, codes), _float_scales(c, scales), _packed_zeros(c, zeros, bits))
        for codes, scales, zeros in (gate_up, down)
    )
    no_third = (None, None, None)
    return c.builder.op(
        "QMoE",
        x,
        selection,
        *(first[0], first[1], None),
        *(second[0], second[1], None),
        *no_third,
        first[2],
        second[2],
        None,
        weights,
        domain=CONTRIB,
        k=top_k,
        normalize_routing_weights=0,
        expert_weight_bits=bits,
        block_size=group,
        weights_prepacked=0,
        accuracy_level=INT8_ACTIVATIONS,
        **_SWIGLU_ATTRIBUTES,
    )


_SWIGLU_ATTRIBUTES: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


def attention_attributes(
    c: Context,
    w_uk: Weight,
    w_uv: Weight,
    cache_format: str,
    softmax_scale: float,
    latent_norm_epsilon: float,
    mode: str,
) -> dict[str, Any]:
    """Attributes of the node `ai.mla_deploy::LatentAttention`."""
    heads, nope, rank = w_uk.shape
    return {
        "cache_format": cache_format,
        "kv_lora_rank": rank,
        "latent_norm_epsilon": latent_norm_epsilon,
        "mode": mode,
        "num_heads": heads,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": 2 * c.fakes[2].shape[-1],
        "softmax_scale": softmax_scale,
        "v_head_dim": w_uv.shape[2],
    }


def _latent_attention(
    c: Context,
    functions: AttentionFunctions,
    q: ir.Value,
    kv: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    w_uk: Weight,
    w_uv: Weight,
    block_table: ir.Value,
    past_lengths: ir.Value,
    new_lengths: ir.Value,
    cache: list[ir.Value],
    cache_format: str,
    softmax_scale: float,
    latent_norm_epsilon: float,
    mode: str,
) -> tuple[ir.Value, list[ir.Value]]:
    attributes = attention_attributes(
        c, w_uk, w_uv, cache_format, softmax_scale, latent_norm_epsilon, mode
    )
    # The scope has the layer; the node is the one people look for.
    output, *present = c.builder.op(
        "LatentAttention",
        *(q, kv, cos, sin, stored(c, w_uk), stored(c, w_uv)),
        *(block_table, past_lengths, new_lengths, *cache),
        domain=ATTENTION_DOMAIN,
        overload=functions.overload(attributes, w_uk.dtype),
        outputs=1 + len(cache),
        **attributes,
    )
    return output, present


def _float_scales(c: Context, scales: Weight) -> ir.Value:
    """Scales in the type of the activations."""
    chunks = plain_chunks(scales.source, torch.float32)
    return c.builder.initializer(scales.name, torch.float32, scales.shape, chunks)


def _packed_zeros(c: Context, zeros: Weight, bits: int) -> ir.Value:
    shape = (*zeros.shape[:-1], -(-zeros.shape[-1] * bits // 8))
    chunks = packed_zero_chunks(zeros.source, bits)
    return c.builder.initializer(zeros.name, torch.uint8, shape, chunks)


def _require_whole_zeros(zeros: Weight) -> None:
    if zeros.dtype is not torch.uint8:
        raise ConfigError(
            f"{zeros.name}: ONNX Runtime's operator takes whole zeros only",
            found="exact zeros",
            hint="quantize experts and embedding with integer zeros",
        )
