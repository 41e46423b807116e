"""Small random models of Hugging Face's classes, with weights that make a test see something.

With the usual initialisation (0.02) attention is uniform and every router indifferent: a wrong
softmax scale or rotation would go unnoticed. Here each matrix preserves the variance of its input,
and queries and keys are larger still.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    PreTrainedModel,
    YoutuConfig,
    YoutuForCausalLM,
)

VOCAB = 192
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
CLASSES: dict[str, Any] = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "minicpm3": (MiniCPM3Config, MiniCPM3ForCausalLM),
    "youtu": (YoutuConfig, YoutuForCausalLM),
}
DENSE = ("minicpm3", "youtu")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.1, 2.9, 3.6, 4.0],
    "long_factor": [1.0, 1.1, 1.3, 1.6, 2.1, 2.9, 3.6, 4.0],
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def random_model(
    family: str, *, moe: bool, yarn: bool, q_lora: bool, sharpness: float = 2.0, **changes: Any
) -> Any:
    """A random model of two to three layers in float32, of the family that a model_type names."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 160,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3 if moe else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1 if moe else 3,
        "kv_lora_rank": 64,
        "q_lora_rank": 48 if q_lora else None,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "max_position_embeddings": 256,
        "rope_parameters": dict(YARN if yarn else PLAIN_ROPE),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "eager",
    }
    if family == "deepseek_v2":
        settings |= {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7}
    else:
        settings |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
    settings |= changes
    if family == "glm4_moe_lite":
        dense = settings["first_k_dense_replace"]
        settings["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (3 - dense)
    config_class, model_class = CLASSES[family]
    if family in DENSE:
        known = {*config_class().to_dict(), "attn_implementation"}
        settings = {name: value for name, value in settings.items() if name in known}
    model = model_class(config_class(**settings)).eval()
    randomize(model, sharpness)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, sharpness: float = 2.0) -> None:
    """Weights that preserve variance, sharp attention, norms that are not one."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if "inv_freq" in name or "embed_scale" in name:
            continue
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
        elif "e_score_correction_bias" in name:
            tensor.normal_(std=0.1)
        else:
            gain = sharpness if any(part in name for part in ("q_proj", "q_b_proj", "kv_")) else 1.0
            tensor.normal_(std=gain / tensor.shape[-1] ** 0.5)


def save_checkpoint(model: PreTrainedModel, folder: Path, tokenizer_from: Path | None) -> Path:
    """Save as Hugging Face does; with a tokenizer, if one is named, so that it can be exported."""
    model.save_pretrained(folder)
    if tokenizer_from is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    return folder


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Shapes: ids [S] to [S, vocab]."""
    return model(ids.unsqueeze(0), use_cache=False).logits[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
