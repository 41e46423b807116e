"""Write an MLA checkpoint in floating point as GGUF, for llama.cpp.

    python benchmarks/synthetic_gguf.py CHECKPOINT OUT.gguf [--type q4_0]      (needs PyPI's gguf)

Architecture `deepseek2`, with or without experts and q_lora_rank, no scaled rope; or `minicpm3`. No
vocabulary (prompts are ids). In a deepseek2 kv_b_proj is split into k_b, transposed, and v_b, which
is what lets llama.cpp absorb them; for a minicpm3 it knows no absorbed form, and caches a key and a
value for each head. Every matrix is Q4_0, the output matrix too; or all are float32, and nothing
but the cache is rounded. Norms and routers are float32.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import gguf
import torch

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig

LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def keys(writer: gguf.GGUFWriter, config: MlaConfig) -> None:
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.model_type == "minicpm3":
        _minicpm3_keys(writer, config)
    else:
        _deepseek2_keys(writer, config)


def _minicpm3_keys(writer: gguf.GGUFWriter, config: MlaConfig) -> None:
    """llama.cpp knows scale_emb, scale_depth and dim_model_base by heart: 12, 1.4 and 256."""
    branch = 1.4 / config.num_hidden_layers**0.5
    scales = config.embedding_scale * branch, config.logit_scale * config.hidden_size
    if not all(map(math.isclose, scales, (12, 256))):
        raise SystemExit("llama.cpp computes with other scales than this minicpm3 has")
    writer.add_layer_norm_rms_eps(config.rms_norm_eps * branch**2)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length(config.v_head_dim)


def _deepseek2_keys(writer: gguf.GGUFWriter, config: MlaConfig) -> None:
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    moe = config.moe
    if moe is None:
        writer.add_leading_dense_block_count(config.num_hidden_layers)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_shared_count(0)
        writer.add_expert_weights_scale(1.0)
        return
    writer.add_leading_dense_block_count(moe.first_k_dense_replace)
    writer.add_expert_feed_forward_length(moe.moe_intermediate_size)
    writer.add_expert_count(moe.n_routed_experts)
    writer.add_expert_used_count(moe.num_experts_per_tok)
    writer.add_expert_shared_count(moe.n_shared_experts)
    writer.add_expert_group_count(moe.n_group)
    writer.add_expert_group_used_count(moe.topk_group)
    writer.add_expert_weights_scale(moe.routed_scaling_factor)
    writer.add_expert_weights_norm(moe.norm_topk_prob)
    gating = gguf.ExpertGatingFuncType
    is_v2 = config.model_type == "deepseek_v2"
    writer.add_expert_gating_func(gating.SOFTMAX if is_v2 else gating.SIGMOID)


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors under their names in a GGUF."""
    config = checkpoint.config
    nope = config.qk_nope_head_dim
    found: dict[str, torch.Tensor] = {}
    longrope = config.rope.longrope
    if longrope is not None:
        factors = torch.tensor(longrope.factors)
        found |= {f"rope_factors_{name}.weight": factors for name in ("short", "long")}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if name in TOP:
            found[TOP[name]] = tensor
            continue
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if int(layer) >= config.num_hidden_layers:
            continue
        block = f"blk.{layer}"
        if part == "self_attn.kv_b_proj.weight" and config.model_type == "minicpm3":
            found[f"{block}.attn_kv_b.weight"] = tensor
        elif part == "self_attn.kv_b_proj.weight":
            heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
            found[f"{block}.attn_k_b.weight"] = heads[:, :nope].transpose(1, 2)  # [H, rank, nope]
            found[f"{block}.attn_v_b.weight"] = heads[:, nope:]  # [H, v_head_dim, rank]
        elif match := EXPERT.fullmatch(part):
            stack = experts.setdefault(f"{block}.ffn_{match[2]}_exps.weight", {})
            stack[int(match[1])] = tensor
        else:
            found[f"{block}.{LAYER[part]}"] = tensor
    for name, stack in experts.items():
        found[name] = torch.stack([stack[index] for index in range(len(stack))])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("q4_0", "f32"), default="q4_0")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.checkpoint)
    config = checkpoint.config
    architecture = "minicpm3" if config.model_type == "minicpm3" else "deepseek2"
    writer = gguf.GGUFWriter(str(args.out), architecture)
    keys(writer, config)
    kind = gguf.GGMLQuantizationType[args.type.upper()]
    for name, tensor in tensors(checkpoint).items():
        values = tensor.float().contiguous().numpy()
        if values.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
