"""Make a checkpoint with random weights, shard by shard: for measuring time and memory.

    python benchmarks/make_synthetic.py OUT [--layers 12] [--hidden 2048] [--experts 0] ...
    python benchmarks/make_synthetic.py OUT --config CONFIG.json

The default is the model of 0.71 B parameters that the project's figures speak of: a dense
DeepSeek-V2 with 12 layers, hidden 2048, 16 heads, rank 512 + 64 and a vocabulary of 32000; --config
takes any model's config.json instead. Weights are normal with variance 1 / inputs, in bfloat16, so
that activations stay of order one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mla_deploy.families import load_config
from mla_deploy.model import build
from mla_deploy.modules.base import checkpoint_shapes
from mla_deploy.shards import ShardWriter

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "models" / "tiny-mla"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def config_json(args: argparse.Namespace) -> dict[str, Any]:
    """A DeepSeek-V2 config.json."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "q_lora_rank": None,
        "kv_lora_rank": args.rank,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": args.context,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    if args.experts:
        config |= {
            "n_routed_experts": args.experts,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "scoring_func": "softmax",
        }
    return config


def weights(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for norms; matrices scaled so that a unit input gives a unit output."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.empty(shape, dtype=torch.bfloat16)
    for rows in values.split(max(1, (1 << 22) // shape[1])):
        rows.copy_(torch.randn(rows.shape, generator=generator) * shape[1] ** -0.5)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, help="a config.json in place of the sizes")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--experts", type=int, default=0, help="64 makes it V2-Lite-like")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder to copy it from")
    args = parser.parse_args()
    sizes = ("layers", "hidden", "ffn", "heads", "rank", "vocab", "context", "experts")
    if args.config and any(getattr(args, name) != parser.get_default(name) for name in sizes):
        parser.error("--config has sizes of its own: leave the others out")

    started = time.monotonic()
    args.out.mkdir(parents=True)
    config = json.loads(args.config.read_text()) if args.config else config_json(args)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (args.tokenizer / name).exists():
            shutil.copyfile(args.tokenizer / name, args.out / name)
    generator = torch.Generator().manual_seed(args.seed)
    writer = ShardWriter(args.out)
    parameters = 0
    for name, shape in checkpoint_shapes(build(load_config(args.out))).items():
        tensor = weights(shape, generator)
        parameters += tensor.numel()
        writer.add(name, tensor)
    writer.finish()
    print(f"{args.out}: {parameters / 1e9:.3f} B parameters, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
