"""How well the latent of a real model is kept, by solver, group, bits and rotation.

    python benchmarks/latent_solver.py [MODEL] [--text FILE] [--tokens 4096]

Runs the text through the model in float32, takes the latents of all layers (gamma folded out, so
of unit RMS), and prints the signal-to-noise ratio in dB that each way of quantising leaves: as they
are, and after the block Hadamard rotation.

- `range`: scale and zero from minimum and maximum.
- `hqq`: twenty half-quadratic steps for the zero.
- `hqq + scale`: the same, then the least-squares scale.
- `N rounds`: `solve_affine` of the cache record with N alternations instead of its own count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import mla_deploy.quant.cache_codes as cache_codes
from mla_deploy.cache import pages_for
from mla_deploy.config import MlaConfig
from mla_deploy.families import load_config
from mla_deploy.model import empty_cache, load_model, unquantized
from mla_deploy.quant.fold import hadamard_block, rotate_blocks
from mla_deploy.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 512
STEPS = 20
Restore = Callable[[torch.Tensor], torch.Tensor]
"""Groups [G, group] to what is left of them after quantisation."""


@torch.no_grad()
def latents(model_path: Path, text: str, tokens: int) -> torch.Tensor:
    """What the cache is given. Shapes: [layers, T, rank]."""
    config: MlaConfig = unquantized(load_config(model_path))
    model = load_model(model_path)
    ids = torch.tensor(Tokenizer.open(model_path).encode(text)[:tokens])
    found = []
    for window in ids.split(WINDOW):
        steps = len(window)
        pages = pages_for(steps)
        cache = model(
            window.unsqueeze(0),
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([steps]),
            torch.arange(1, pages + 1).unsqueeze(0),
            torch.zeros(1, 1, dtype=torch.int64),
            empty_cache(config, pages + 1),
        )[1]
        found.append(torch.stack([parts[0][1:].flatten(0, 1)[:steps] for parts in cache]))
    return torch.cat(found, dim=1)


def by_range(x: torch.Tensor, levels: int) -> torch.Tensor:
    low, scale, _ = _start(x, levels)
    return ((x - low) / scale).round() * scale + low


def hqq(x: torch.Tensor, levels: int, *, refits_scale: bool) -> torch.Tensor:
    _low, scale, zero = _start(x, levels)
    mean_steps = x.mean(-1, keepdim=True) / scale
    for _ in range(STEPS):
        codes = (x / scale + zero).round().clamp(0, levels)
        zero = codes.mean(-1, keepdim=True) - mean_steps
    if refits_scale:
        steps = (x / scale + zero).round().clamp(0, levels) - zero
        scale = (steps * x).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
    return ((x / scale + zero).round().clamp(0, levels) - zero) * scale


def rounds(x: torch.Tensor, count: int) -> torch.Tensor:
    own, cache_codes.ROUNDS = cache_codes.ROUNDS, count
    codes, scale, zero = cache_codes.solve_affine(x, 15)
    cache_codes.ROUNDS = own
    return codes * scale.float() + zero.float()


def int8(x: torch.Tensor) -> torch.Tensor:
    codes, scale = cache_codes.encode_symmetric_int8(x.flatten(0, -2), x.shape[-1])
    return (codes.float() * scale.float()).reshape(x.shape)


def _start(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - low) / levels
    return low, scale, -low / scale


WAYS: dict[str, tuple[int, Restore]] = {
    "range, group 64": (64, lambda x: by_range(x, 15)),
    "hqq, group 64": (64, lambda x: hqq(x, 15, refits_scale=False)),
    "hqq + scale, group 64": (64, lambda x: hqq(x, 15, refits_scale=True)),
    **{f"{n} rounds, group 64": (64, lambda x, n=n: rounds(x, n)) for n in (1, 2, 3, 5, 10)},
    "3 rounds, group 32": (32, lambda x: rounds(x, 3)),
    "3 bit, hqq + scale, group 64": (64, lambda x: hqq(x, 7, refits_scale=True)),
    "int8, group 64": (64, int8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "examples/models/tiny-mla")
    parser.add_argument("--text", type=Path, default=ROOT / "examples/text/three-essays.txt")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()

    raw = latents(args.model, args.text.read_text(encoding="utf-8"), args.tokens)
    layers, tokens, rank = raw.shape
    rotated = rotate_blocks(raw, hadamard_block(rank))
    print(f"{tokens} tokens, {layers} layers, rank {rank}; dB a layer\n")
    print("| way | as it is | rotated |")
    print("|---|---|---|")
    peaks = (f"{float(x.abs().amax() / x.square().mean().sqrt()):.0f}" for x in (raw, rotated))
    print(f"| largest value over RMS | {' | '.join(peaks)} |")
    for name, (group, restore) in WAYS.items():
        cells = []
        for x in (raw, rotated):
            groups = x.reshape(layers, -1, group)
            noise = (restore(groups) - groups).square().sum((1, 2))
            ratios = 10 * torch.log10(groups.square().sum((1, 2)) / noise)
            cells.append(" ".join(f"{float(ratio):.1f}" for ratio in ratios))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
