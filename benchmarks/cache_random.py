"""What each cache record leaves of the latents of a random model at full rank.

    python benchmarks/cache_random.py [--rank 512] [--rope 64] [--tokens 512] [--outliers 8]

Two dense layers with random weights, of which a few rows of kv_a_proj are made larger, by 4 to 16
times, as trained models have them (`--outliers`). Prints for each record its bytes, the
signal-to-noise ratio of the latent in dB and the relative error of the attention block's output, by
basis. What a random model predicts means nothing, so there is no KL divergence here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from mla_deploy.cache import cache_record
from mla_deploy.config import MlaConfig
from mla_deploy.families import load_config
from mla_deploy.model import build
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.base import parameter_sources
from mla_deploy.modules.decoder import Decoder
from mla_deploy.quant.calibrate import calibrate
from mla_deploy.quant.calibration_text import CalibrationText

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("int2", "int3", "int4", "int4-g32", "int8", "fp8", "fp16")
WINDOW = 256


def random_config(rank: int, rope: int) -> MlaConfig:
    """tiny-mla's config with another geometry and no experts."""
    raw = json.loads((ROOT / "examples/models/tiny-mla/config.json").read_text())
    raw |= {
        "kv_lora_rank": rank, "qk_rope_head_dim": rope, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
        "hidden_size": 512, "first_k_dense_replace": 2, "q_lora_rank": None,
        "qk_head_dim": 128 + rope, "head_dim": rope,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return load_config(folder)


def random_model(config: MlaConfig, outliers: int) -> Decoder:
    model = build(config)
    for name, parameter, _ in list(parameter_sources(model)):
        shape = parameter.shape
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / shape[-1] ** 0.5
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    for layer in model.layers:
        attention = layer.self_attn
        assert isinstance(attention, LatentAttention)
        for _, linear, first in attention.latent_writers():
            rows = first + torch.randperm(config.kv_lora_rank)[:outliers]
            linear.weight.data[rows] *= 4 + 12 * torch.rand(outliers, 1)
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rope", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--outliers", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = random_config(args.rank, args.rope)
    model = random_model(config, args.outliers)
    ids = torch.randint(0, config.vocab_size, (args.tokens,)).split(WINDOW)
    text = CalibrationText(tuple(tuple(part.tolist()) for part in ids))
    measured, _ = calibrate(
        model, config, text, [FORMATS] * config.num_hidden_layers, measures_kl=False
    )
    print("| record | bytes | none | hadamard | balanced |\n|---|---|---|---|---|")
    for at, name in enumerate(FORMATS):
        size = cache_record(name).bytes_per_token(args.rank, args.rope)
        cells = []
        for basis in ("none", "hadamard", "balanced"):
            decibels = sum(layer[at].sqnr_db[basis] for layer in measured.layers) / 2
            error = sum(layer[at].output_error[basis] for layer in measured.layers) / 2
            cells.append(f"{decibels:.1f} dB, {error:.2%}")
        print(f"| `{name}` | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
