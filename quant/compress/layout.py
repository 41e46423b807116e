"""The result as a checkpoint: names, shapes and config.json, in our layout or in DeepSeek-V3's.

The layout `mla_deploy` (`mla_deploy.families.converted`) holds a conversion exactly. `deepseek_v3`
is what stock engines load, at a price: one frequency table for all layers, no biases on queries,
and an RMSNorm on the latent. The norm is made harmless by one number of the latent that is always
the same and far larger than the others together: the RMS is then nearly constant, and the norm's
weight undoes it. `CONSTANT` says how far, and so how exact that is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mla_deploy.config_reader import PROVENANCE_KEY
from mla_deploy.families.converted import MODEL_TYPE
from mla_deploy.quant.compress.geometry import Geometry
from mla_deploy.quant.compress.layer import LatentWeights, Weights
from mla_deploy.quant.compress.options import Layout
from mla_deploy.quant.compress.source import SourceConfig

CONSTANT = 64.0
"""The constant number of the latent, relative to the root of the squared sum of the others. The
norm is then off by about 1 / (2 CONSTANT^2) of how much that sum varies from token to token."""

_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
)
_LAYER_PARTS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
"""Of a layer, unchanged."""


def latent_rank(geometry: Geometry, layout: Layout) -> int:
    """Numbers of the latent that carry something."""
    return geometry.kv_lora_rank - (layout == "deepseek_v3")


def unchanged_names(layer: int) -> list[str]:
    """Tensors of a layer that are copied as they are."""
    return [f"model.layers.{layer}.{name}" for name in _LAYER_PARTS]


def attention_tensors(
    config: SourceConfig,
    geometry: Geometry,
    source: Weights,
    latent: LatentWeights,
    layout: Layout,
    latent_power: float,
) -> dict[str, torch.Tensor]:
    """The tensors of a layer's attention, in float32, by their names without the layer's prefix.

    Args:
        source: the layer's weights.
        latent_power: E|c_kv|^2.
    """
    # The softmax scale of the result follows from its head size; the rest goes into the queries.
    head = config.head_dim + geometry.qk_rope_head_dim
    scale = latent.softmax_scale * head**0.5
    w_v, b_v = source["self_attn.v_proj.weight"], source.get("self_attn.v_proj.bias")
    latent_rows = latent.down_v @ w_v
    latent_bias = latent.latent_bias.clone()
    if b_v is not None:
        latent_bias += latent.down_v @ b_v
    tensors = {
        "o_proj.weight": latent.o_weight,
        "o_proj.bias": latent.o_bias,
        "kv_b_proj.weight": torch.cat((latent.w_uk, latent.w_uv.transpose(1, 2)), dim=1).flatten(
            0, 1
        ),
    }
    if config.qk_norm:
        tensors |= _normed(config, source, latent, scale, latent_rows, latent_bias)
    else:
        tensors |= _plain(config, source, latent, scale, latent_rows, latent_bias)
    if layout == "deepseek_v3":
        del tensors["q_proj.bias"]  # zero: `geometry` has refused models that have one
        tensors |= _with_constant(tensors, geometry, latent_power)
    return {f"self_attn.{name}": value.contiguous() for name, value in tensors.items()}


def config_json(
    config: SourceConfig,
    geometry: Geometry,
    layout: Layout,
    inv_freq: list[list[float]],
    dtype: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json of the result."""
    eos = list(config.eos_token_ids)
    common: dict[str, Any] = {
        **{name: getattr(config, name) for name in _KEPT},
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "hidden_act": "silu",
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": None,
        "kv_lora_rank": geometry.kv_lora_rank,
        "qk_nope_head_dim": config.head_dim,
        "qk_rope_head_dim": geometry.qk_rope_head_dim,
        "v_head_dim": config.head_dim,
        "attention_bias": True,
        "dtype": dtype,
    }
    if layout == "mla_deploy":
        groups = config.num_key_value_heads if config.qk_norm else 0
        return {
            "model_type": MODEL_TYPE,
            **common,
            "qk_norm_groups": groups,
            "inv_freq": inv_freq,
            PROVENANCE_KEY: dict(provenance),
        }
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **common,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_interleave": True,
        # No layer has experts; the keys that speak of them must still make sense.
        "first_k_dense_replace": config.num_hidden_layers,
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": config.intermediate_size,
        PROVENANCE_KEY: dict(provenance),
    }


def _plain(
    config: SourceConfig,
    source: Weights,
    latent: LatentWeights,
    scale: float,
    latent_rows: torch.Tensor,
    latent_bias: torch.Tensor,
) -> dict[str, torch.Tensor]:
    heads, d = config.num_attention_heads, config.head_dim
    w_q = source["self_attn.q_proj.weight"].unflatten(0, (heads, d))  # [H, d, D]
    b_q = _bias(source, "q", config.attention_width).unflatten(0, (heads, d, 1))
    w_k, b_k = source["self_attn.k_proj.weight"], _bias(source, "k", config.key_width)

    def with_rotary(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, latent.rope_q @ x), dim=1).flatten(0, 1) * scale

    return {
        "q_proj.weight": with_rotary(w_q),
        "q_proj.bias": with_rotary(b_q).squeeze(-1),
        "kv_a_proj_with_mqa.weight": torch.cat(
            (latent.down_k @ w_k + latent_rows, latent.rope_k @ w_k)
        ),
        "kv_a_proj_with_mqa.bias": torch.cat(
            (latent.down_k @ b_k + latent_bias, latent.rope_k @ b_k)
        ),
    }


def _normed(
    config: SourceConfig,
    source: Weights,
    latent: LatentWeights,
    scale: float,
    latent_rows: torch.Tensor,
    latent_bias: torch.Tensor,
) -> dict[str, torch.Tensor]:
    rope = len(latent.rope_k)
    return {
        "q_proj.weight": source["self_attn.q_proj.weight"],
        "q_proj.bias": _bias(source, "q", config.attention_width),
        "k_proj.weight": source["self_attn.k_proj.weight"],
        "k_proj.bias": _bias(source, "k", config.key_width),
        "q_norm.weight": source["self_attn.q_norm.weight"] * scale,
        "k_norm.weight": source["self_attn.k_norm.weight"],
        "q_rope_proj.weight": latent.rope_q.transpose(1, 2),
        "k_latent_proj.weight": torch.cat((latent.down_k, latent.rope_k)),
        "kv_a_proj_with_mqa.weight": torch.nn.functional.pad(latent_rows, (0, 0, 0, rope)),
        "kv_a_proj_with_mqa.bias": torch.nn.functional.pad(latent_bias, (0, rope)),
    }


def _with_constant(
    tensors: Mapping[str, torch.Tensor], geometry: Geometry, latent_power: float
) -> dict[str, torch.Tensor]:
    """The latent with its constant number, and the norm's weight that undoes the norm."""
    rank, rope = geometry.kv_lora_rank, geometry.qk_rope_head_dim
    constant = CONSTANT * math.sqrt(latent_power)
    rms = math.sqrt((constant**2 + latent_power) / rank)
    rows, bias = tensors["kv_a_proj_with_mqa.weight"], tensors["kv_a_proj_with_mqa.bias"]
    at = rank - 1
    return {
        "kv_a_proj_with_mqa.weight": torch.cat(
            (rows[:at], torch.zeros(1, rows.shape[1]), rows[len(rows) - rope :])
        ),
        "kv_a_proj_with_mqa.bias": torch.cat(
            (bias[:at], torch.tensor([constant]), bias[len(bias) - rope :])
        ),
        "kv_b_proj.weight": torch.nn.functional.pad(tensors["kv_b_proj.weight"], (0, 1)),
        "kv_a_layernorm.weight": torch.full((rank,), rms),
    }


def _bias(source: Weights, kind: str, width: int) -> torch.Tensor:
    found = source.get(f"self_attn.{kind}_proj.bias")
    return torch.zeros(width) if found is None else found
