"""The node `ai.mla_deploy::LatentAttention`, as ONNX Runtime and the TensorRT plugin take it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from mla_deploy.exporters.onnx.attention_function import ATTENTION_DOMAIN, AttentionFunctions
from mla_deploy.exporters.onnx.ort_weights import stored_as
from mla_deploy.exporters.onnx.translate import Context, Weight


def latent_attention(
    c: Context,
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
    *,
    weight_dtype: torch.dtype | None = None,
    functions: AttentionFunctions | None = None,
) -> tuple[ir.Value, list[ir.Value]]:
    """The node of the op with these arguments.

    Args:
        weight_dtype: of w_uk and w_uv; their own if None.
        functions: where the node's definition is put; without it the node can only be run by a
            library that knows it.
    """
    heads, nope, rank = w_uk.shape
    attributes: dict[str, Any] = {
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
    dtype = weight_dtype or w_uk.dtype
    # The scope has the layer; the node is the one people look for.
    output, *present = c.builder.op(
        "LatentAttention",
        *(q, kv, cos, sin, stored_as(c, w_uk, dtype), stored_as(c, w_uv, dtype)),
        *(block_table, past_lengths, new_lengths, *cache),
        domain=ATTENTION_DOMAIN,
        overload=functions.overload(attributes, dtype) if functions else "",
        outputs=1 + len(cache),
        **attributes,
    )
    return output, present
