"""What each cache costs in quality: record, basis, allocation, at every depth.

    python benchmarks/cache_study.py MODEL TEXT --calibration TEXT [--window 4096] [--windows 2]
        [--budgets 90 100 120] [--only int4]

Runs windows of the text through the model in float32 with every cache in all layers at once, and
prints a Markdown table of perplexity and KL divergence against the unquantised model, and of the
divergence by how many tokens a prediction saw. Calibration and allocation use another text.

Attention is computed by torch's fused kernel instead of the reference's score matrix, which takes
minutes at full length; both agree to rounding.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.evaluate.text import encode_text, read_text
from mla_deploy.families import load_config
from mla_deploy.model import build, load_model
from mla_deploy.modules.decoder import DecoderLayer
from mla_deploy.ops import attention
from mla_deploy.quant.allocate import Choice, allocate
from mla_deploy.quant.cache_choice import auto_formats
from mla_deploy.quant.calibrate import calibrate
from mla_deploy.quant.calibration_text import MAX_TOKENS, CalibrationText
from mla_deploy.quant.fold import LatentRotation, hadamard_block
from mla_deploy.quant.weight_axes import weight_rotation
from mla_deploy.quant.window_run import WindowRun, rotated
from mla_deploy.tokenizer import Tokenizer

Caches = list[tuple[str, LatentRotation | None]]
"""Record and rotation of each layer."""
ORDER = ("int4", "int3", "int2", "int4-g32", "int8", "fp16")
SPANS = (512, 2048)
"""Borders between the spans of positions."""


def fused(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    past_lengths: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """`attend_expanded` for whole windows."""
    heads, steps = q_nope.shape[1], q_nope.shape[2]
    assert not bool(past_lengths.any())
    c_kv, k_pe = c_kv[:, :steps], k_pe[:, :steps]
    shared = k_pe.unsqueeze(1).expand(-1, heads, -1, -1)
    key = torch.cat((c_kv.unsqueeze(1) @ w_uk.transpose(1, 2), shared), -1)
    value = c_kv.unsqueeze(1) @ w_uv
    query = torch.cat((q_nope, q_pe), -1)
    found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=softmax_scale)
    return found.transpose(1, 2).flatten(2)


def probabilities(run: WindowRun, caches: Caches) -> torch.Tensor:
    """Log-probabilities with these caches. Shapes: to [S, vocab]."""
    state: tuple[torch.Tensor, torch.Tensor | None] = run.start
    for layer, (name, rotation) in enumerate(caches):
        with rotated(run.attention(layer), rotation):
            state = run.layer(layer, *state, name)
    x, residual = state
    assert residual is not None
    return run.log_probabilities(x, residual)


def rotations_of_weights(path: Path) -> list[LatentRotation]:
    """What `quantize` folds without a calibration."""
    checkpoint = Checkpoint(path)
    block = hadamard_block(checkpoint.config.kv_lora_rank)
    found = []
    for layer in build(checkpoint.config).layers:
        assert isinstance(layer, DecoderLayer)
        found.append(weight_rotation(checkpoint, layer, block))
    return found


class Scores:
    """Of one way of caching, over all windows."""

    def __init__(self) -> None:
        self.kl: list[torch.Tensor] = []
        self.nats: list[torch.Tensor] = []
        self.same: list[torch.Tensor] = []

    def add(self, expected: torch.Tensor, found: torch.Tensor, ids: torch.Tensor) -> None:
        self.kl.append((expected.exp() * (expected - found)).sum(-1).clamp_min(0))
        self.nats.append(-found[:-1].gather(1, ids[1:, None])[:, 0])
        self.same.append((expected.argmax(-1) == found.argmax(-1)).float())

    @property
    def perplexity(self) -> float:
        return math.exp(float(torch.cat(self.nats).mean()))

    def row(self, name: str, size: float, original: Scores) -> str:
        kl = torch.cat(self.kl)
        spans = []
        for low, high in zip((0, *SPANS), (*SPANS, 1 << 30), strict=True):
            part = torch.cat([one[low:high] for one in self.kl])
            spans.append(f"{float(part.mean()):.5f}" if len(part) else "-")
        change = self.perplexity / original.perplexity - 1
        return (
            f"| {name} | {size:g} | {change:+.2%} | {float(kl.mean()):.5f} "
            f"| {float(kl.median()):.5f} | {float(kl.quantile(0.99)):.4f} "
            f"| {float(torch.cat(self.same).mean()):.2%} | {' | '.join(spans)} |"
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--calibration-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--budgets", type=float, nargs="*", default=[80, 90, 100, 108, 120])
    parser.add_argument("--only", default="", help="ways whose name holds this")
    args = parser.parse_args()

    attention.attend_absorbed = fused
    config, model = load_config(args.model), load_model(args.model)
    layers = config.num_hidden_layers
    formats = (*sorted(auto_formats(config), key=ORDER.index), "fp8")
    text = CalibrationText.read([args.calibration], args.model, config, args.calibration_tokens)
    measured, tried = calibrate(
        model, config, text, [formats] * config.num_hidden_layers, measures_kl=bool(args.budgets)
    )
    sizes = {one.format: one.bytes for one in measured.layers[0]}
    for found, rotation in zip(tried, rotations_of_weights(args.model), strict=True):
        found["weights"] = rotation

    def uniform(at: int) -> Iterator[tuple[str, float, Caches]]:
        name = formats[at]
        for kind in ("hadamard", "weights", "balanced", "none"):
            yield f"{name}, {kind}", sizes[name], [(name, one[kind]) for one in tried]
        if name != "int8":
            mean = sizes[name] + (sizes["int8"] - sizes[name]) / layers
            caches = [("int8", tried[0]["weights"])]
            caches += [(name, one["weights"]) for one in tried[1:]]
            yield f"{name}, weights, int8 in the first layer", mean, caches
        best = [layer[at].rotation for layer in measured.layers]
        if len(set(best)) > 1:
            caches = [(name, one[kind]) for one, kind in zip(tried, best, strict=True)]
            yield f"{name}, by error: {' '.join(best)}", sizes[name], caches

    def allocated(budget: float) -> tuple[str, float, Caches]:
        items = [
            [Choice(one.format, one.bytes, one.kl or 0.0) for one in layer if one.format != "fp8"]
            for layer in measured.layers
        ]
        found = allocate(items, budget * layers)
        picked = [layer[index] for layer, index in zip(measured.layers, found.chosen, strict=True)]
        caches = [(one.format, tried[at][one.rotation]) for at, one in enumerate(picked)]
        names = " ".join(one.format for one in picked)
        return f"auto {budget:g}: {names}", found.cost / layers, caches

    def ways() -> Iterator[tuple[str, float, Caches]]:
        yield from uniform(0)
        yield from map(allocated, args.budgets)
        for at in range(1, len(formats)):
            yield from uniform(at)

    for layer, choices in enumerate(measured.layers):
        for one in choices:
            decibels = ", ".join(f"{kind} {value:.1f}" for kind, value in one.sqnr_db.items())
            errors = ", ".join(f"{kind} {value:.3%}" for kind, value in one.output_error.items())
            print(f"layer {layer} {one.format}: dB {decibels}; output {errors}; KL {one.kl}")
    corpus = encode_text(Tokenizer.open(args.model), read_text(args.text))
    stretches = [
        corpus.ids[start : start + args.window]
        for start in range(0, args.windows * args.window, args.window)
    ]
    exact: Caches = [("fp32", None)] * layers
    original, expected = Scores(), []
    for ids in stretches:
        found = probabilities(WindowRun(model, config, ids), exact)
        original.add(found, found, torch.tensor(ids))
        expected.append(found)
    print(f"\nperplexity {original.perplexity:.3f}, {args.windows} windows of {args.window}\n")
    borders = [f"to {SPANS[0]}", f"to {SPANS[1]}", "beyond"]
    print(f"| cache | bytes | perplexity | KL | median | p99 | top-1 | {' | '.join(borders)} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, size, caches in ways():
        if args.only not in name:
            continue
        scores = Scores()
        for ids, log_p in zip(stretches, expected, strict=True):
            found = probabilities(WindowRun(model, config, ids), caches)
            scores.add(log_p, found, torch.tensor(ids))
        print(scores.row(name, size, original), flush=True)


if __name__ == "__main__":
    main()
