"""Memory and time of `mla-deploy convert` on random Llamas of the size of Llama-3.2-1B.

    python benchmarks/conversion_scale.py --layers 1 2 4 --text TEXT

Each number of layers is a process of its own: its time, the time of each further layer, and its
peak of resident memory. 16 layers are 1.24 B parameters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mla_deploy.quant.compress.source import read_source_config, source_shapes
from mla_deploy.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONVERT = """
import json, sys
from mla_deploy.evaluate.speed import peak_rss_bytes
from mla_deploy.quant.compress.convert import convert_checkpoint
from mla_deploy.quant.compress.options import ConvertOptions
options = ConvertOptions(kv_lora_rank=448, qk_rope_head_dim=64,
    calibration=(sys.argv[3],), tokens=int(sys.argv[4]), window=int(sys.argv[5]))
report = convert_checkpoint(sys.argv[1], sys.argv[2], options)
print(json.dumps({"seconds": report.seconds, "peak_rss": peak_rss_bytes()}))
"""


def write_source(folder: Path, layers: int) -> int:
    """A random checkpoint in bfloat16; gives its number of parameters."""
    raw = {**CONFIG, "num_hidden_layers": layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = ROOT / "examples" / "models" / "tiny-mla" / name
        (folder / name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder)
    total = 0
    for name, shape in source_shapes(read_source_config(raw, "config.json")).items():
        total += torch.Size(shape).numel()
        if len(shape) == 1:
            writer.add(name, torch.ones(shape, dtype=torch.bfloat16))
            continue
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        writer.add(name, tensor.normal_(std=shape[1] ** -0.5, generator=generator))
    writer.finish()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1 << 15)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    print("| layers | parameters | seconds | peak RSS, GB |\n|---|---|---|---|")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parameters = write_source(folder / "source", layers)
            started = time.perf_counter()
            arguments = [folder / "source", folder / "out", args.text, args.tokens, args.window]
            found = subprocess.run(
                [sys.executable, "-c", CONVERT, *map(str, arguments)],
                check=True,
                capture_output=True,
                text=True,
            )
            seconds = time.perf_counter() - started
            rss = json.loads(found.stdout)["peak_rss"]
            row = f"{layers} | {parameters / 1e9:.3f} B | {seconds:.0f} | {rss / 1e9:.2f}"
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
