"""Quality of the cache against other ways of quantising one, on the same model and text.

    python benchmarks/cache_peers.py [MODEL] TEXT [--prefix 1024] [--chunk 128] [--length 2048]
        [--calibration TEXT] [--only int4] [--llama-python PYTHON]

A prefix is filled in, then the rest of the window chunk by chunk; predictions of the rest are held
against those with an unquantised cache. Every prediction counted here looks back at a quantised
prefix.

- `transformers`: QuantizedCache with the hqq backend, keys and values of every head, which
  quantises its whole history again whenever its residual window is full;
- `int4, default`: what `quantize` makes without options, int8 in the first layer;
- `int4, N times`: our record, encoded and decoded N times over, as if history were quantised again;
- `llama.cpp`: itself, on the same weights in float32, with `--llama-python`: the Python of an
  environment that has llama-cpp-python. Its f16 row says how far its arithmetic is from ours;
- `ggml q4_0, q8_0`: the number formats of its cache (blocks of 32, one float16 scale) on latent and
  rope key in our arithmetic, and with our rotation.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_study import fused, rotations_of_weights
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from mla_deploy.cache import CacheRecord, cache_record
from mla_deploy.evaluate.text import encode_text, read_text
from mla_deploy.families import load_config
from mla_deploy.model import load_model
from mla_deploy.ops import attention
from mla_deploy.quant.calibrate import calibrate
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.fold import LatentRotation, hadamard_block
from mla_deploy.quant.window_run import WindowRun, rotated
from mla_deploy.tokenizer import Tokenizer

Rotations = Sequence[LatentRotation | None]
"""Of each layer."""
Restore = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""c_kv and k_pe [T, width] to what is left of them."""


def times(record: CacheRecord, count: int) -> Restore:
    def restore(c_kv: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(count):
            stored = [part.unsqueeze(0) for part in record.encode(c_kv, k_pe)]
            c_kv, k_pe = (one[0] for one in record.decode(stored, torch.float32))
        return c_kv, k_pe

    return restore


def ggml(bits: int) -> Restore:
    """q8_0: scale max|x| / 127; q4_0: the value of largest size becomes -8."""

    def one(x: torch.Tensor) -> torch.Tensor:
        blocks = x.unflatten(-1, (-1, 32))
        at = blocks.abs().argmax(-1, keepdim=True)
        extreme = blocks.gather(-1, at)
        scale = extreme.abs() / 127 if bits == 8 else extreme / -8
        inverse = torch.where(scale != 0, 1 / scale, 0.0)
        low, high = (-127, 127) if bits == 8 else (-8, 7)
        codes = (blocks * inverse).round().clamp(low, high)
        return (codes * scale.half().float()).flatten(-2)

    return lambda c_kv, k_pe: (one(c_kv), one(k_pe))


def ours(
    run: WindowRun, restores: Sequence[Restore], rotations: Rotations, prefix: int
) -> torch.Tensor:
    """Log-probabilities behind the prefix, every token of each layer's cache restored."""
    plain = attention.new_latents
    state: Any = run.start
    try:
        for layer, restore in enumerate(restores):

            def patched(
                *arguments: Any, restore: Restore = restore
            ) -> tuple[torch.Tensor, torch.Tensor]:
                c_kv, k_pe = plain(*arguments)
                c_kv, k_pe = restore(c_kv[0], k_pe[0])
                return c_kv.unsqueeze(0), k_pe.unsqueeze(0)

            attention.new_latents = patched
            with rotated(run.attention(layer), rotations[layer]):
                state = run.layer(layer, *state)
        return run.log_probabilities(*state)[prefix:]
    finally:
        attention.new_latents = plain


def transformers_cache(
    model: Any, ids: torch.Tensor, cache: Any, prefix: int, chunk: int
) -> torch.Tensor:
    found = []
    model(ids[None, :prefix], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for start in range(prefix, len(ids), chunk):
        logits = model(
            ids[None, start : start + chunk], past_key_values=cache, use_cache=True
        ).logits
        found.append(logits[0].float().log_softmax(-1))
    return torch.cat(found)


class LlamaCpp:
    """llama.cpp in a process of its environment; a GGUF of the model is written first."""

    HERE = Path(__file__).resolve().parent

    def __init__(self, python: str, model: Path, folder: Path) -> None:
        self.python, self.folder, self.gguf = python, folder, folder / "model.gguf"
        write = [sys.executable, self.HERE / "synthetic_gguf.py", model, self.gguf, "--type", "f32"]
        subprocess.run(write, check=True)

    def __call__(
        self, windows: list[torch.Tensor], cache: str, prefix: int, chunk: int
    ) -> list[torch.Tensor]:
        """Log-probabilities behind the prefix, of each window."""
        ids, out = self.folder / "ids.npy", self.folder / "logits.npy"
        np.save(ids, torch.stack(windows).int().numpy())
        script = self.HERE / "llama_logits.py"
        command = [self.python, script, self.gguf, ids, out, cache, str(prefix), str(chunk)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if "size = " in line or "attn_rot_k" in line:
                print(f"<!-- {cache}: {line} -->")
        return [torch.from_numpy(one).log_softmax(-1) for one in np.load(out)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("model", type=Path, nargs="?", default=root / "examples/models/tiny-mla")
    parser.add_argument("text", type=Path)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--calibration", type=Path, help="text for the balanced axes")
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--llama-python", help="Python of an environment with llama-cpp-python")
    args = parser.parse_args()

    config, model = load_config(args.model), load_model(args.model)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    corpus = encode_text(Tokenizer.open(args.model), read_text(args.text))
    windows = [
        torch.tensor(corpus.ids[start : start + args.length])
        for start in range(0, args.windows * args.length, args.length)
    ]
    attention.attend_absorbed = fused
    width = config.qk_nope_head_dim + rope + config.v_head_dim
    values = config.num_attention_heads * width

    def quantized(bits: int, axis: int, group: int) -> Any:
        return QuantizedCache(
            "hqq", peer.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=group
        )

    unrounded = [times(cache_record("int4"), 0)] * config.num_hidden_layers
    plain: Rotations = [None] * config.num_hidden_layers
    hadamard = [LatentRotation(hadamard_block(rank))] * config.num_hidden_layers
    record = cache_record("int4")
    own = record.bytes_per_token(rank, rope)
    size8 = cache_record("int8").bytes_per_token(rank, rope)
    ways: dict[str, tuple[float, Callable[[torch.Tensor, WindowRun], torch.Tensor]]] = {}

    def add(
        name: str, size: float, restore: Restore, rotations: Rotations, first: Restore | None = None
    ) -> None:
        restores = [first or restore, *[restore] * (config.num_hidden_layers - 1)]
        ways[name] = size, lambda _, run: ours(run, restores, rotations, args.prefix)

    def add_peer(name: str, size: float, make: Callable[[], Any]) -> None:
        ways[name] = (
            size,
            lambda ids, _: transformers_cache(peer, ids, make(), args.prefix, args.chunk),
        )

    add_peer("transformers, unquantised", 4 * values, lambda: DynamicCache())
    add("int8, hadamard", size8, times(cache_record("int8"), 1), hadamard)
    add("int4, hadamard", own, times(record, 1), hadamard)
    by_weights = rotations_of_weights(args.model)
    mean = own + (size8 - own) / config.num_hidden_layers
    add("int4, default", mean, times(record, 1), by_weights, times(cache_record("int8"), 1))
    add("int4, weights", own, times(record, 1), by_weights)
    add("int4, hadamard, 16 times", own, times(record, 16), hadamard)
    if args.calibration is not None:
        text = CalibrationText.read([args.calibration], args.model, config, 1536)
        _, tried = calibrate(
            model, config, text, [("int4",)] * config.num_hidden_layers, measures_kl=False
        )
        balanced = [one["balanced"] for one in tried]
        add("int4, balanced", own, times(record, 1), balanced)
        wide = cache_record("int4-g32")
        add("int4-g32, balanced", wide.bytes_per_token(rank, rope), times(wide, 1), balanced)
        add("int8, balanced", size8, times(cache_record("int8"), 1), balanced)
    add("int4, as it is", own, times(record, 1), plain)
    add("ggml q8_0", (rank + rope) * 34 / 32, ggml(8), plain)
    add("ggml q4_0", (rank + rope) * 18 / 32, ggml(4), plain)
    add("ggml q4_0, hadamard", (rank + rope) * 18 / 32, ggml(4), hadamard)
    for bits in (8, 4, 2):
        for axis in (0, 1):
            size = values * (bits / 8 + 2 * 4 / 64)
            add_peer(
                f"transformers hqq, {bits} bit, axis {axis}",
                size,
                lambda b=bits, a=axis: quantized(b, a, 64),
            )
    print(f"behind a prefix of {args.prefix}, {args.windows} windows of {args.length}\n")
    print("| cache | bytes | perplexity | KL | p99 | top-1 |\n|---|---|---|---|---|---|")
    exact = [
        ours(WindowRun(model, config, ids.tolist()), unrounded, plain, args.prefix)
        for ids in windows
    ]
    base = _perplexity(exact, windows, args.prefix)

    def row(name: str, size: float, found: list[torch.Tensor]) -> None:
        pairs = list(zip(exact, found, strict=True))
        kl = torch.cat([(q.exp() * (q - p)).sum(-1).clamp_min(0) for q, p in pairs])
        same = torch.cat([(q.argmax(-1) == p.argmax(-1)).float() for q, p in pairs])
        change = _perplexity(found, windows, args.prefix) / base - 1
        print(
            f"| {name} | {size:.0f} | {change:+.2%} | {float(kl.mean()):.5f} "
            f"| {float(kl.quantile(0.99)):.4f} | {float(same.mean()):.2%} |",
            flush=True,
        )

    for name, (size, run_one) in ways.items():
        if args.only in name:
            every = [run_one(ids, WindowRun(model, config, ids.tolist())) for ids in windows]
            row(name, size, every)
    if args.llama_python is not None:
        with tempfile.TemporaryDirectory() as folder:
            llama = LlamaCpp(args.llama_python, args.model, Path(folder))
            for cache, bits in (("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)):
                if args.only in (name := f"llama.cpp, {cache}"):
                    found = llama(windows, cache, args.prefix, args.chunk)
                    row(name, (rank + rope) * bits / 8, found)


def _perplexity(log_p: list[torch.Tensor], windows: list[torch.Tensor], prefix: int) -> float:
    nats = [
        -rows[:-1].gather(1, ids[prefix + 1 :, None])
        for rows, ids in zip(log_p, windows, strict=True)
    ]
    return math.exp(float(torch.cat(nats).mean()))


if __name__ == "__main__":
    main()
