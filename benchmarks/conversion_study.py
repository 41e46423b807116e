"""What converting to MLA costs a model: methods, steps, healing and the int4 cache.

    python benchmarks/conversion_study.py methods MODEL... --text TEXT
    python benchmarks/conversion_study.py steps MODEL... --text TEXT
    python benchmarks/conversion_study.py heal MODEL... --text TEXT --held-out TEXT --recall 256

Without --text a model writes its own calibration text. Figures are losses on held-out windows, in
nats a token, above the source's; each line is printed as it comes. Where a size can be divided into
latent and rotary channels in several ways, all are tried, for the published methods too, and the
best is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from mla_deploy.cache import formats_of_layers
from mla_deploy.evaluate import evaluate
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.retrieval import DEPTHS, score_synthetic
from mla_deploy.evaluate.scorer import TorchScorer
from mla_deploy.quant.compress.calibration import Windows
from mla_deploy.quant.compress.convert import calibration_windows, convert_checkpoint
from mla_deploy.quant.compress.layer import load_layer
from mla_deploy.quant.compress.methods import QUERY_AWARE, LayerTask, Steps, convert_layer
from mla_deploy.quant.compress.options import ConvertOptions
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.compress.streams import HeldOut, SourceLayer, carry, score
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint

D_KV = (64, 32, 16)
RATIOS = (0.5, 0.3125, 0.1875, 0.125)
METHODS = (
    QUERY_AWARE,
    "transmla",
    "mha2mla-2norm-joint",
    "mha2mla-uniform-joint",
    "mha2mla-high-joint",
    "mha2mla-low-joint",
    "mha2mla-2norm-split",
)
ALL = Steps()
STEPS = {
    "all steps": ALL,
    "heads not weighed by queries": dataclasses.replace(ALL, queries=False),
    "distances of all pairs": dataclasses.replace(ALL, attention_distances=False),
    "no mean rotation": dataclasses.replace(ALL, mean_rotation=False),
    "not centred": dataclasses.replace(ALL, centred=False),
    "keys not weighed by queries": dataclasses.replace(ALL, query_metric=False),
    "values not weighed by o_proj": dataclasses.replace(ALL, output_metric=False),
    "frequencies not folded": dataclasses.replace(ALL, folds=(1,)),
    "keys and values at equal traces": dataclasses.replace(ALL, gammas=(1.0,)),
}


class Study:
    """A model measured once, converted in many ways in memory."""

    @torch.no_grad()
    def __init__(self, path: Path, windows: Windows) -> None:
        self.source = Source(path)
        self.config = self.source.config
        self.windows = windows
        table = self.source.read("model.embed_tokens.weight").float()
        fitted, self.of_source = table[windows.fitted], table[windows.held_out]
        self.start = self.of_source.clone()
        self.layers = []
        for index in range(self.config.num_hidden_layers):
            layer = SourceLayer(self.config, index, load_layer(self.source, index))
            self.layers.append((layer, layer.measure_white(), *layer.measure(fitted)))
            h = self.of_source
            self.of_source = layer.finish(h, layer.attend(*layer.project(h)))
        self.loss = self._scored(self.of_source).loss

    def _scored(self, converted: torch.Tensor) -> HeldOut:
        return score(self.source, self.of_source, converted, self.windows.held_out)

    def converted(self, method: str, rank: int, rope: int, steps: Steps | None = None) -> HeldOut:
        """Scored against the source."""
        h = self.start.clone()
        for layer, white, moments, distances, sample in self.layers:
            task = LayerTask(
                config=self.config,
                weights=layer.weights,
                inv_freq=layer.inv_freq,
                moments=moments,
                white=white,
                distances=distances,
                window=h.shape[1],
                rank=rank,
                rope=rope,
                stock_frequencies=False,
                error=sample.error,
            )
            carry(layer, h, convert_layer(task, method, steps).weights)
        return self._scored(h)

    def ropes(self, method: str, total: int) -> list[int]:
        """Ways to divide `total` numbers that make sense for a method."""
        d, groups = self.config.head_dim, self.config.num_key_value_heads
        if method.startswith("mha2mla"):  # the paper's eighth of a head, and more
            wanted = [groups * max(2, d // 8) * times for times in (1, 2, 4)]
        elif method == "transmla":  # one head, and around it
            wanted = [d // 2, d, 2 * d]
        else:
            wanted = [max(2, int(total * share) // 2 * 2) for share in (0.125, 0.25, 0.375, 0.5)]
        return sorted({rope for rope in wanted if rope < total and rope <= groups * d})


def added_loss(scored: HeldOut) -> float:
    """Nats a token above the source."""
    return scored.converted_loss - scored.loss


def methods(study: Study) -> None:
    print("| ratio | method | added loss | divergence | rotary |\n|---|---|---|---|---|")
    for ratio in RATIOS:
        total = round(ratio * study.config.cached_numbers)
        for method in METHODS:
            found = {
                rope: study.converted(method, total - rope, rope)
                for rope in study.ropes(method, total)
            }
            if found:
                rope = min(found, key=lambda one: added_loss(found[one]))
                row = f"{added_loss(found[rope]):.4f} | {found[rope].kl:.4f} | {rope}"
                print(f"| {ratio} | {method} | {row} |", flush=True)


def steps(study: Study) -> None:
    print("| ratio | steps | added loss | divergence |\n|---|---|---|---|")
    for ratio in RATIOS:
        total = round(ratio * study.config.cached_numbers)
        tried = [
            (rope, study.converted(QUERY_AWARE, total - rope, rope))
            for rope in study.ropes(QUERY_AWARE, total)
        ]
        rope = min(tried, key=lambda one: added_loss(one[1]))[0]
        for name, chosen in STEPS.items():
            found = study.converted(QUERY_AWARE, total - rope, rope, chosen)
            print(f"| {ratio} | {name} | {added_loss(found):.4f} | {found.kl:.4f} |", flush=True)


def heal(path: Path, args: argparse.Namespace) -> None:
    """Through the checkpoints, as a user would; loss and recall as `mla-deploy eval` has them."""
    texts = tuple(map(str, args.text))
    common: dict[str, Any] = {"calibration": texts, "tokens": args.tokens, "window": args.window}
    source = Source(path).config
    full = source.num_key_value_heads * source.head_dim
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exact = ConvertOptions(kv_lora_rank=full, qk_rope_head_dim=full, **common)
        convert_checkpoint(path, folder / "source", exact)
        base = measured(folder / "source", args)
        print(f"source: loss {base[0]:.4f}, recall {base[1]}\n")
        print("| d_kv | cache | model | added loss | recall | bytes of a token |")
        print("|---|---|---|---|---|---|", flush=True)
        for d_kv in D_KV:
            plain, healed, int4 = (folder / f"{d_kv}-{one}" for one in ("plain", "healed", "int4"))
            convert_checkpoint(path, plain, ConvertOptions(like_paper=d_kv, **common))
            healing = ConvertOptions(
                like_paper=d_kv, heal=texts, heal_tokens=args.heal_tokens, **common
            )
            report = convert_checkpoint(path, healed, healing)
            quantize_checkpoint(healed, int4, QuantizeOptions(kv="int4", weights="none"))
            share = report.geometry.ratio(source)
            formats = formats_of_layers(source.num_hidden_layers)
            kept = report.bytes_per_token()[formats] / report.source_bytes_per_token
            for model, size in ((plain, share), (healed, share), (int4, kept)):
                loss, recall = measured(model, args)
                row = (
                    f"{d_kv} | {size - 1:+.2%} | {model.name.split('-')[1]} | {loss - base[0]:+.4f}"
                )
                print(
                    f"| {row} | {recall} | {size * report.source_bytes_per_token:.0f} |", flush=True
                )


def measured(folder: Path, args: argparse.Namespace) -> tuple[float, str]:
    """Loss on the held-out text, and the share of keys recalled at each length."""
    scorer = TorchScorer(folder)
    loss = math.log(evaluate(scorer, args.held_out.read_text(), window=args.window).perplexity)
    found = score_synthetic(
        scorer, None, ["key-value"], args.recall, trials=args.trials, journal=Journal()
    )
    shares = [
        sum(one.accuracy for one in found if one.length == length) / len(DEPTHS)
        for length in args.recall
    ]
    return loss, " ".join(f"{share:.0%}" for share in shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("methods", "steps", "heal"))
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", action="append", type=Path, default=[])
    parser.add_argument("--held-out", type=Path, help="for heal: text that is scored")
    parser.add_argument("--tokens", type=int, default=1 << 14, help="of calibration")
    parser.add_argument("--heal-tokens", type=int, default=1 << 16)
    parser.add_argument("--recall", nargs="*", type=int, default=[], help="lengths, for heal")
    parser.add_argument("--trials", type=int, default=4, help="of recall, a length and depth")
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args()
    for path in args.models:
        print(f"\n## {path.name}: {args.what}\n")
        if args.what == "heal":
            heal(path, args)
            continue
        options = ConvertOptions(
            target_ratio=0.5,
            calibration=tuple(map(str, args.text)) or ("self",),
            tokens=args.tokens,
            window=args.window,
        )
        windows = calibration_windows(Source(path), options)
        assert windows is not None
        study = Study(path, windows)
        print(f"loss of the source: {study.loss:.4f}\n")
        {"methods": methods, "steps": steps}[args.what](study)


if __name__ == "__main__":
    main()
