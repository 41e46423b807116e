"""Write the checkpoint of `make_synthetic.py` as a Q4_0 GGUF, for llama.cpp.

    python benchmarks/synthetic_gguf.py CHECKPOINT OUT.gguf          (needs PyPI's gguf)

Architecture `deepseek2`, dense throughout, no vocabulary (prompts are ids). kv_b_proj is split into
k_b, transposed, and v_b, which is what lets llama.cpp absorb them. Every matrix is Q4_0, the output
matrix too; norms are float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from mla_deploy.config import MlaConfig, load_config

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def keys(writer: gguf.GGUFWriter, config: MlaConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(0)
    writer.add_expert_weights_scale(1.0)
    writer.add_tokenizer_model("no_vocab")


def add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    values = tensor.float().contiguous().numpy()
    if values.ndim == 1:
        writer.add_tensor(f"{name}.weight", values)
        return
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = load_config(args.checkpoint)
    writer = gguf.GGUFWriter(str(args.out), "deepseek2")
    keys(writer, config)
    nope = config.qk_nope_head_dim
    for shard in sorted(args.checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                stem = name.removesuffix(".weight")
                if stem in TOP:
                    add(writer, TOP[stem], tensor)
                    continue
                layer, _, part = stem.removeprefix("model.layers.").partition(".")
                if part == "self_attn.kv_b_proj":
                    heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
                    k_b, v_b = heads[:, :nope].transpose(1, 2), heads[:, nope:]
                    add(writer, f"blk.{layer}.attn_k_b", k_b)  # [H, kv_lora_rank, nope]
                    add(writer, f"blk.{layer}.attn_v_b", v_b)  # [H, v_head_dim, kv_lora_rank]
                else:
                    add(writer, f"blk.{layer}.{LAYER[part]}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
