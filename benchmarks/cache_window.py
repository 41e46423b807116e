"""Whether the first and the latest tokens are worth 16 bit in a quantised cache.

    python benchmarks/cache_window.py [MODEL] TEXT [--length 1024] [--windows 4]

Every query sees the first `sinks` and the last `recent` tokens as they are, and all others
quantised. Prints the KL divergence against an unquantised cache, and the bytes a token and layer at
that length and at 32768 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cache_study import fused
from weight_feedback import probabilities

from mla_deploy.cache import CacheRecord, cache_record
from mla_deploy.config import load_config
from mla_deploy.evaluate.text import encode_text, read_text
from mla_deploy.model import load_model
from mla_deploy.ops import attention
from mla_deploy.quant.fold import hadamard_block, rotate_blocks
from mla_deploy.tokenizer import Tokenizer

LONG = 32768


def attend(record: CacheRecord, block: int, sinks: int, recent: int) -> Callable[..., torch.Tensor]:
    """`attend_expanded` on two caches at once. Shapes: as there."""

    def restore(c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        encoded = record.encode(rotate_blocks(c_kv[0], block), k_pe[0])
        found = record.decode([part.unsqueeze(0) for part in encoded], torch.float32)
        return [rotate_blocks(found[0], block), found[1]]

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
        place = torch.arange(steps)
        kept = (place[:, None] - place < recent) | (place < sinks)
        both = []
        for latent, rope in (exact, restore(*exact)):
            key = latent.unsqueeze(1) @ w_uk.transpose(1, 2)
            scores = q_nope @ key.transpose(2, 3) + q_pe @ rope.unsqueeze(1).transpose(2, 3)
            both.append((scores, latent.unsqueeze(1) @ w_uv))
        scores = torch.where(kept, both[0][0], both[1][0])
        p = attention.masked_softmax(scores, past_lengths, softmax_scale)
        output = (p * kept) @ both[0][1] + (p * ~kept) @ both[1][1]
        return output.transpose(1, 2).flatten(2)

    return function


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("model", type=Path, nargs="?", default=root / "examples/models/tiny-mla")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()

    config, model = load_config(args.model), load_model(args.model)
    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    block = hadamard_block(config.kv_lora_rank)
    corpus = encode_text(Tokenizer.open(args.model), read_text(args.text))
    starts = range(0, args.windows * args.length, args.length)
    stretches = [corpus.ids[start : start + args.length] for start in starts]
    attention.attend_absorbed = fused
    expected = [probabilities(model, config, ids) for ids in stretches]
    half = cache_record("fp16").bytes_per_token(*sizes)
    print(f"| cache | bytes at {args.length} | at {LONG} | KL |\n|---|---|---|---|")
    for name in ("int4", "int2"):
        record = cache_record(name)
        for sinks, recent in ((0, 0), (4, 0), (64, 0), (0, 64), (4, 128)):
            attention.attend_absorbed = attend(record, block, sinks, recent)
            found = [probabilities(model, config, ids) for ids in stretches]
            kl = torch.cat(
                [(q.exp() * (q - p)).sum(-1) for q, p in zip(expected, found, strict=True)]
            )
            own = record.bytes_per_token(*sizes)
            costs = [own + (sinks + recent) * (half - own) / n for n in (args.length, LONG)]
            print(
                f"| {name}, first {sinks}, last {recent} | {costs[0]:.1f} | {costs[1]:.1f} "
                f"| {float(kl.mean()):.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
