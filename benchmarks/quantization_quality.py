"""What quantisation costs in perplexity and KL divergence.

    python benchmarks/quantization_quality.py MODEL TEXT [--tokens 30000] [--window 512]
        [--calibration TEXT] [--only "kv "]

Quantises the model in every way of the list below into a temporary folder, scores the text with the
torch reference, and prints a Markdown table against the unquantised model in float32. The caches
and the weights are quantised one at a time, so that the columns say whose loss it is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mla_deploy.config import load_config
from mla_deploy.evaluate.scorer import TorchScorer
from mla_deploy.evaluate.scores import evaluate
from mla_deploy.evaluate.text import read_text
from mla_deploy.model import cache_parts
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint

FLOAT = QuantizeOptions(kv="fp32", weights="none")
CACHES = ("int8", "fp8", "int4-g32", "int4", "int3", "int2")
CALIBRATED = ("int8", "int4-g32", "int4", "int3", "int2")
BUDGETS = (75.0, 90.0, 100.0, 108.0, 120.0)
"""Bytes a token and layer, at rank 128 and rope 32; an int4 record takes 108."""
CASES = {
    **{f"kv {name}": QuantizeOptions(kv=name, weights="none") for name in CACHES},
    **{
        f"kv {name}, not rotated": QuantizeOptions(kv=name, weights="none", rotate=False)
        for name in CACHES
    },
    "kv fp16": QuantizeOptions(kv="fp16", weights="none"),
    "weights int4": QuantizeOptions(kv="fp32", weights="int4"),
    "weights int4, exact zeros": QuantizeOptions(kv="fp32", weights="int4", zeros="exact"),
    "weights int4, group 32": QuantizeOptions(kv="fp32", weights="int4", group=32),
    "weights int4, group 32, exact zeros": QuantizeOptions(
        kv="fp32", weights="int4", group=32, zeros="exact"
    ),
    "weights int4, lm_head int4": QuantizeOptions(kv="fp32", weights="int4", lm_head="int4"),
    "weights int4, embedding int8": QuantizeOptions(kv="fp32", weights="int4", embedding="int8"),
    "weights int4, embedding int4": QuantizeOptions(kv="fp32", weights="int4", embedding="int4"),
    "weights int8": QuantizeOptions(kv="fp32", weights="int8"),
    "weights int8, experts int4": QuantizeOptions(kv="fp32", weights="int8", experts="int4"),
    "kv int4, weights int8": QuantizeOptions(kv="int4", weights="int8"),
    "kv int4, weights int4 (the default)": QuantizeOptions(),
}


def calibrated(text: Path) -> dict[str, QuantizeOptions]:
    """The cases that need a text."""
    common: dict[str, Any] = {"weights": "none", "calibration": (str(text),)}
    return {
        **{f"kv {name}, calibrated": QuantizeOptions(kv=name, **common) for name in CALIBRATED},
        **{
            f"kv auto, {budget:g} bytes": QuantizeOptions(kv="auto", kv_budget=budget, **common)
            for budget in BUDGETS
        },
    }


class Remembering(TorchScorer):
    """Computes each window once: every case is held against the same reference."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._known: dict[tuple[int, ...], npt.NDArray[np.float32]] = {}

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = super().logits(ids)
        return self._known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--calibration", type=Path, help="text for the calibrated cases")
    args = parser.parse_args()

    text = read_text(args.text)
    reference = Remembering(args.model)
    print("| what | MB | cache bytes | perplexity | change | KL mean | KL p99 | top-1 agreement |")
    print("|---|---|---|---|---|---|---|---|")
    cases = {"float32": FLOAT, **CASES}
    if args.calibration is not None:
        cases |= calibrated(args.calibration)
    for name, options in cases.items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = quantize_checkpoint(args.model, Path(folder) / "model", options)
            parts = cache_parts(load_config(Path(folder) / "model"))
            found = evaluate(
                TorchScorer(Path(folder) / "model"),
                text,
                reference=reference,
                window=args.window,
                max_tokens=args.tokens,
            )
        against = found.comparison
        assert against is not None
        kv = sum(part.bytes_per_token for layer in parts for part in layer) / len(parts)
        change = found.perplexity / against.reference_perplexity - 1
        print(
            f"| {name} | {report.output_bytes / 1e6:.2f} | {kv:g} | {found.perplexity:.2f} "
            f"| {change:+.2%} | {against.kl_mean:.5f} | {against.kl_p99:.4f} | {against.top1_agreement:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
