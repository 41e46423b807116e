"""Whether the first and the latest tokens are worth 16 bit in a quantised cache.

    python benchmarks/cache_window.py [MODEL] TEXT --calibration TEXT [--length 4096] [--windows 1]
        [--record int4]

Every query sees the first `sinks` and the last `recent` tokens as they are, and all others
quantised, in the basis that the calibration gave each layer. Prints the KL divergence against an
unquantised cache, and the bytes a token and layer at that length and at 32768 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cache_study import fused, probabilities

from mla_deploy.cache import CacheRecord, cache_record
from mla_deploy.evaluate.text import encode_text, read_text
from mla_deploy.families import load_config
from mla_deploy.model import load_model
from mla_deploy.ops import attention
from mla_deploy.quant.calibrate import calibrate
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.window_run import WindowRun
from mla_deploy.tokenizer import Tokenizer

LONG = 32768
BLOCK = 512
"""Queries at a time: the scores of all would be gigabytes."""
KEPT = (
    *((sinks, 0) for sinks in (0, 4, 16, 64)),
    *((0, recent) for recent in (32, 64, 128, 256)),
    *((4, 64), (64, 64), (64, 256)),
)
"""Sinks and recent tokens."""


def attend(record: CacheRecord, sinks: int, recent: int) -> Callable[..., torch.Tensor]:
    """`attend_expanded` on two caches at once. Shapes: as there."""

    def restore(c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        stored = [part.unsqueeze(0) for part in record.encode(c_kv[0], k_pe[0])]
        return list(record.decode(stored, torch.float32))

    def function(
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        c_kv: torch.Tensor,
        k_pe: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        past_lengths: torch.Tensor,
        softmax_scale: float,
    ) -> torch.Tensor:
        steps = q_nope.shape[2]
        exact = [c_kv[:, :steps], k_pe[:, :steps]]
        both = []
        for latent, rope in (exact, restore(*exact)):
            shared = rope.unsqueeze(1).expand(-1, w_uk.shape[0], -1, -1)
            key = torch.cat((latent.unsqueeze(1) @ w_uk.transpose(1, 2), shared), -1)
            both.append((key, latent.unsqueeze(1) @ w_uv))
        query = torch.cat((q_nope, q_pe), -1) * softmax_scale
        found = []
        for start in range(0, steps, BLOCK):
            end = min(start + BLOCK, steps)
            asks, sees = torch.arange(start, end)[:, None], torch.arange(end)
            kept = (asks - sees < recent) | (sees < sinks)
            part = query[:, :, start:end]
            scores = torch.where(
                kept,
                part @ both[0][0][:, :, :end].transpose(2, 3),
                part @ both[1][0][:, :, :end].transpose(2, 3),
            )
            p = scores.masked_fill(sees > asks, -torch.inf).softmax(-1)
            values = [value[:, :, :end] for _, value in both]
            found.append((p * kept) @ values[0] + (p * ~kept) @ values[1])
        return torch.cat(found, 2).transpose(1, 2).flatten(2)

    return function


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("model", type=Path, nargs="?", default=root / "examples/models/tiny-mla")
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=1536)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--record", default="int4")
    args = parser.parse_args()

    attention.attend_absorbed = fused
    config, model = load_config(args.model), load_model(args.model)
    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    text = CalibrationText.read([args.calibration], args.model, config, args.calibration_tokens)
    measured, tried = calibrate(
        model, config, text, [(args.record,)] * config.num_hidden_layers, measures_kl=False
    )
    chosen = [one[layer[0].rotation] for one, layer in zip(tried, measured.layers, strict=True)]
    # The cache itself stays exact: `attend` restores what a query sees of it.
    caches = [("fp32", rotation) for rotation in chosen]
    corpus = encode_text(Tokenizer.open(args.model), read_text(args.text))
    starts = range(0, args.windows * args.length, args.length)
    runs = [WindowRun(model, config, corpus.ids[at : at + args.length]) for at in starts]
    expected = [probabilities(run, caches) for run in runs]
    record = cache_record(args.record)
    own, half = (one.bytes_per_token(*sizes) for one in (record, cache_record("fp16")))
    print(f"{args.record}, calibrated, {args.windows} windows of {args.length}\n")
    print(f"| first | last | bytes at {args.length} | at {LONG} | KL |\n|---|---|---|---|---|")
    for sinks, recent in KEPT:
        attention.attend_absorbed = attend(record, sinks, recent)
        found = [probabilities(run, caches) for run in runs]
        kl = torch.cat([(q.exp() * (q - p)).sum(-1) for q, p in zip(expected, found, strict=True)])
        costs = [own + (sinks + recent) * (half - own) / n for n in (args.length, LONG)]
        print(
            f"| {sinks} | {recent} | {costs[0]:.1f} | {costs[1]:.1f} | {float(kl.mean()):.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
