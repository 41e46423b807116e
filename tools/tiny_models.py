"""The architectures that tools/train_tiny.py trains, and how the larger ones begin."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MLA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    "base": {"hidden_size": 512, "intermediate_size": 896, "num_attention_heads": 8},
}
"""`base`: about 15 M parameters, 31 MB in float16; `small` is for trying the recipe."""
DENSE: dict[str, dict[str, Any]] = {
    "small": {"num_hidden_layers": 3, "head": 16, "kv_lora_rank": 32},
    "base": {"num_hidden_layers": 6, "head": 64, "kv_lora_rank": 256},
}
OFFSETS, SHARPNESS = 6, 16.0
"""The name of an entry ends 2 tokens before its value and begins at most 6 before."""


def build(arch: str, size: str = "tiny") -> Any:
    """`mla` (DeepSeek-V3), `gqa` or `mha` (Llama), of about 5 M parameters if `tiny`.

    The larger ones have no experts: transformers computes those one after another.
    """
    if size != "tiny":
        return build_dense(arch, size)
    if arch == "mla":
        return DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON, **MLA))
    groups = 4 if arch == "gqa" else 8
    config = LlamaConfig(**COMMON, num_hidden_layers=6, num_key_value_heads=groups, head_dim=32)
    return LlamaForCausalLM(config)


def build_dense(arch: str, size: str) -> Any:
    common, dense = COMMON | SIZES[size], DENSE[size]
    common["num_hidden_layers"] = layers = dense["num_hidden_layers"]
    # transformers' 0.02 is so small here that looking up is learnt much later.
    common["initializer_range"] = 0.8 / common["hidden_size"] ** 0.5
    heads, head = common["num_attention_heads"], dense["head"]
    if arch == "mla":
        # Heads of equal size for keys and values, which flash attention asks for.
        halves = {"qk_nope_head_dim": head // 2, "qk_rope_head_dim": head // 2, "v_head_dim": head}
        own = {"q_lora_rank": None, "kv_lora_rank": dense["kv_lora_rank"], **halves}
        own |= {"num_key_value_heads": heads, "first_k_dense_replace": layers}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**common, **own))
    else:
        groups = heads // 2 if arch == "gqa" else heads
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=groups, head_dim=head))
    begin_with_offsets(model, head // 2 if arch == "mla" else head)
    return model


@torch.no_grad()
def begin_with_offsets(model: Any, width: int) -> None:
    """Heads of the first layer begin by looking 1, 2, ... places back, through `width` channels.

    A value must know the name before it and a question its own before the two can be matched.
    Left to chance that takes most of the steps until lookups work, and MLA stays at a few names.
    All embeddings get a common part, from which these queries and keys are made: then their product
    depends on the distance alone, sum_i u_i^2 cos(f_i (distance - offset)).
    """
    hidden, attention = model.config.hidden_size, model.model.layers[0].self_attn
    common = torch.randn(hidden)
    model.get_input_embeddings().weight += model.config.initializer_range * common
    # With it a normed embedding, of length sqrt(hidden), has a product of about 1.
    common *= 2**0.5 / (common.norm() * hidden**0.5)
    frequency = COMMON["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    heads = model.config.num_attention_heads
    queries = attention.q_proj.weight.view(heads, -1, hidden)[:, -width:]
    u = (frequency > 0.09).float()
    u *= (SHARPNESS * attention.scaling**-1 / u.sum()) ** 0.5
    is_mla = hasattr(attention, "kv_a_proj_with_mqa")

    def channels(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """[width, hidden]; DeepSeek has the two channels of a frequency side by side."""
        both = torch.stack([first, second], 1).flatten() if is_mla else torch.cat([first, second])
        return both[:, None] * common

    keys = attention.kv_a_proj_with_mqa if is_mla else attention.k_proj
    rows = keys.weight[-width:] if is_mla else keys.weight
    rows.view(-1, width, hidden).add_(channels(u, 0 * u))
    for head in range(heads):
        angle = frequency * (1 + head % OFFSETS)
        queries[head] += channels(u * angle.cos(), -u * angle.sin())
