"""What quantisation costs in perplexity and KL divergence.

    python benchmarks/quantization_quality.py MODEL TEXT [--tokens 30000] [--window 512]
        [--calibration TEXT] [--only weights]

Quantises the model in every way of the list below into a temporary folder, scores the text with the
torch reference, and prints a Markdown table against the unquantised model in float32. The caches
and the weights are quantised one at a time, so that the columns say whose loss it is. With
`--calibration` there are rows for bits by layer, which need one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mla_deploy.evaluate.scorer import TorchScorer
from mla_deploy.evaluate.scores import evaluate
from mla_deploy.evaluate.text import read_text
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint

FLOAT = QuantizeOptions(kv="fp32", weights="none")
CASES = {
    "kv int4 (first layer int8)": QuantizeOptions(kv="int4", weights="none"),
    "kv int4 in every layer": QuantizeOptions(kv="int4", kv_first="int4", weights="none"),
    "kv int4 in every layer, not rotated": QuantizeOptions(
        kv="int4", kv_first="int4", weights="none", rotate=False
    ),
    "kv int8": QuantizeOptions(kv="int8", weights="none"),
    "kv int8, not rotated": QuantizeOptions(kv="int8", weights="none", rotate=False),
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


def mixed(bits: float, text: Path) -> QuantizeOptions:
    """Bits by layer under a budget, the latent as it is."""
    return QuantizeOptions(
        kv="fp32",
        weights="auto",
        weights_budget=bits,
        calibration=(str(text),),
        rotate=False,
    )


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
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--budgets", type=float, nargs="*", default=[5, 6], help="bits a weight")
    args = parser.parse_args()

    text = read_text(args.text)
    cases = {"float32": FLOAT, **CASES}
    for bits in args.budgets if args.calibration is not None else ():
        cases[f"weights auto, {bits:g} bits"] = mixed(bits, args.calibration)
    reference = Remembering(args.model)
    print("| what | MB | perplexity | change | KL mean | KL p99 | top-1 agreement |")
    print("|---|---|---|---|---|---|---|")
    for name, options in cases.items():
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = quantize_checkpoint(args.model, Path(folder) / "model", options)
            found = evaluate(
                TorchScorer(Path(folder) / "model"),
                text,
                reference=reference,
                window=args.window,
                max_tokens=args.tokens,
            )
        against = found.comparison
        assert against is not None
        change = found.perplexity / against.reference_perplexity - 1
        print(
            f"| {name} | {report.output_bytes / 1e6:.2f} | {found.perplexity:.2f} | {change:+.2%} "
            f"| {against.kl_mean:.5f} | {against.kl_p99:.4f} | {against.top1_agreement:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
