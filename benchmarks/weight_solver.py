"""The solver of `mla_deploy.quant.hqq` against HQQ: error and speed at 4 bit.

    python benchmarks/weight_solver.py [--group 64] [--bits 4]

Samples: normal weights, heavy tails (Student's t, 3 degrees of freedom), and the matrices of
tiny-mla. Errors: NMSE, the squared error over the squared weights; and the mean of |error|^0.7 in
units of the group's standard deviation, which is the norm that HQQ aims at. Speed: one thread.

- `range`: scale and zero from minimum and maximum, nothing solved.
- `hqq package`: the package itself, which stops all groups when the mean error of all rises.
- `hqq`: its twenty half-quadratic steps, power function included, each group for itself.
- `hqq, shrinkage left out`: the same without the power function.
- `zero rounded at the end`: HQQ's, with the codes kept or chosen anew.
- `zero rounded in the loop`: HQQ's, with the zero rounded in each step.
- `ours`: `solve`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from mla_deploy.quant.hqq import solve

MODEL = Path(__file__).resolve().parents[1] / "examples" / "models" / "tiny-mla"
P, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
Restore = Callable[[torch.Tensor], torch.Tensor]
"""Groups [G, group] to what is left of them after quantisation."""


def samples(group: int) -> dict[str, torch.Tensor]:
    """Groups [G, group] of each kind."""
    torch.manual_seed(0)
    matrices = [
        tensor.float().reshape(-1, group)
        for name, tensor in load_file(MODEL / "model.safetensors").items()
        if tensor.dim() == 2 and "embed" not in name and tensor.shape[1] % group == 0
    ]
    values = 2_560_000
    return {
        "normal": torch.randn(values // group, group) * 0.02,
        "heavy tails": torch.distributions.StudentT(3.0).sample((values // group, group)) * 0.02,
        "tiny-mla": torch.cat(matrices),
    }


def start(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of the range."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / levels
    return scale, -low / scale


def half_quadratic(
    x: torch.Tensor, levels: int, *, shrinks: bool = True, is_whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """HQQ as published: the zero by half-quadratic splitting at a fixed scale."""
    scale, zero = start(x, levels)
    beta = BETA
    for _ in range(STEPS):
        if is_whole:
            zero = zero.round().clamp(0, levels)
        codes = (x / scale + zero).round().clamp(0, levels)
        target = x
        if shrinks:
            error = x - (codes - zero) * scale
            size = error.abs()
            target = x - error.sign() * (size - size.pow(P - 1) / beta).relu()
        zero = (codes - target / scale).mean(-1, keepdim=True)
        beta *= KAPPA
    return scale, zero.round().clamp(0, levels) if is_whole else zero


def nearest(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    """What is left of x with the best codes."""
    return ((x / scale + zero).round().clamp(0, levels) - zero) * scale


def solvers(bits: int, group: int) -> dict[str, Restore]:
    """Every way to quantise, by name."""
    levels = 2**bits - 1

    def ours(x: torch.Tensor, zeros: str) -> torch.Tensor:
        found = solve(x, bits, zeros)
        return (found.codes.float() - found.zero.float()) * found.scale.float()

    def rounded(x: torch.Tensor, *, keeps_codes: bool) -> torch.Tensor:
        scale, zero = half_quadratic(x, levels, shrinks=False)
        whole = zero.round().clamp(0, levels)
        codes = (x / scale + (zero if keeps_codes else whole)).round().clamp(0, levels)
        return (codes - whole) * scale

    ways: dict[str, Restore] = {
        "range": lambda x: nearest(x, *start(x, levels), levels),
        "hqq": lambda x: nearest(x, *half_quadratic(x, levels), levels),
        "hqq, shrinkage left out": lambda x: nearest(
            x, *half_quadratic(x, levels, shrinks=False), levels
        ),
        "ours, exact zeros": lambda x: ours(x, "exact"),
        "zero rounded at the end, codes kept": lambda x: rounded(x, keeps_codes=True),
        "zero rounded at the end, codes chosen anew": lambda x: rounded(x, keeps_codes=False),
        "zero rounded in the loop": lambda x: nearest(
            x, *half_quadratic(x, levels, is_whole=True), levels
        ),
        "ours, whole zeros": lambda x: ours(x, "integer"),
    }
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        return ways

    def package(x: torch.Tensor) -> torch.Tensor:
        codes, meta = Quantizer.quantize(
            x, nbits=bits, group_size=group, axis=1, optimize=True, device="cpu", bitpack=False
        )
        restored: torch.Tensor = (codes.float() - meta["zero"]) * meta["scale"]
        return restored

    return {"hqq package": package, **ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)

    found = samples(args.group)
    print("| solver | " + " | ".join(f"{name}: NMSE, l_p" for name in found) + " | M weights/s |")
    print("|---|" + "---|" * (len(found) + 1))
    for name, restore in solvers(args.bits, args.group).items():
        cells, values, seconds = [], 0, 0.0
        for x in found.values():
            began = time.perf_counter()
            blocks = x.split((128 << 10) // args.group) if name != "hqq package" else [x]
            restored = torch.cat([restore(block) for block in blocks])
            seconds += time.perf_counter() - began
            values += x.numel()
            error = restored - x
            nmse = float(error.square().sum() / x.square().sum())
            l_p = float((error.abs() / x.std(-1, keepdim=True)).pow(P).mean())
            cells.append(f"{nmse:.3e}, {l_p:.4f}")
        print(f"| {name} | {' | '.join(cells)} | {values / seconds / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
