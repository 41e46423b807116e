"""Train the tiny models that tests and studies convert, quantise and run.

    python tools/train_tiny.py --arch gqa --corpora FOLDER --tokenizer examples/models/tiny-mla \
        --minutes 60 -o examples/models/tiny-llama

The text is books, WikiText-2 (validation), GSM8K (train) and synthetic key-value recall, so that a
model has something to look up far back; the WikiText-2 and GSM8K test sets are left for tests.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOOKS = ("sherlock.txt", "wizard_of_oz.txt", "tinyshakespeare.txt")
KEYS = """amber birch cedar delta ember flint grove heron ivory jade kelp lotus maple noble olive
pearl quartz raven slate topaz umber violet willow zinc""".split()  # noqa: SIM905
RECALLS = 16_000
LONG_EVERY, LONG_FACTOR = 10, 8
"""Every tenth step has windows eight times as long, so that long positions are trained too."""
WARMUP_STEPS, FINAL_RATE = 100, 0.05
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MLA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}


def build(arch: str) -> Any:
    """A model of about 5 M parameters: `mla` (DeepSeek-V3), `gqa` or `mha` (Llama)."""
    if arch == "mla":
        return DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON, **MLA))
    groups = 4 if arch == "gqa" else 8
    config = LlamaConfig(**COMMON, num_hidden_layers=6, num_key_value_heads=groups, head_dim=32)
    return LlamaForCausalLM(config)


def training_text(corpora: Path) -> str:
    """Everything, cut into pieces and shuffled."""
    wiki = (corpora / "wikitext-2/wiki.valid.tokens").read_text()
    for mark in "-,.":
        wiki = wiki.replace(f" @{mark}@ ", mark)
    questions = (corpora / "gsm8k/train.jsonl").read_text().splitlines()
    parts = [(corpora / book).read_text() for book in BOOKS]
    parts.append(wiki.replace("<unk>", "Unk"))
    parts.append(
        "\n\n".join(
            f"Question: {one['question']}\nAnswer: {one['answer']}"
            for one in map(json.loads, questions)
        )
    )
    generator = random.Random(0)
    parts.append("\n".join(recall(generator) for _ in range(RECALLS)))
    pieces = [part[i : i + 4000] for part in parts for i in range(0, len(part), 4000)]
    generator.shuffle(pieces)
    return "\n".join(pieces)


def recall(generator: random.Random) -> str:
    """A list of codes, and some of them asked for again; one list in eight is long."""
    count = generator.randint(3, 10) if generator.random() < 7 / 8 else generator.randint(11, 120)
    names = KEYS if count <= len(KEYS) else [f"{a}-{b}" for a in KEYS for b in KEYS if a != b]
    keys = generator.sample(names, count)
    codes = {key: generator.randint(10, 99) for key in keys}
    asked = generator.sample(keys, min(count, 12))
    told = " ".join(f"{key} is {code};" for key, code in codes.items())
    return f"Codes: {told}" + "".join(f" {key} is {codes[key]};" for key in asked)


class Muon(torch.optim.Optimizer):
    """Steps along orthogonalised momentum (https://kellerjordan.github.io/posts/muon), in float32.

    `torch.optim.Muon` computes in bfloat16, which takes forty times as long on a CPU without units
    for it.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # About as large as a step of AdamW, so that one rate fits both.
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decomposition, by five steps of Newton and Schulz."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def train(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Muon for matrices and AdamW for the rest; a cosine schedule over the time given."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": [embedding], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizers = [
        Muon(matrices, {"lr": args.rate, "weight_decay": 0.1, "momentum": 0.95}),
        torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    ]
    generator = torch.Generator().manual_seed(1)
    start, step, tokens, mean_loss = time.monotonic(), 0, 0, math.nan
    while (part := (time.monotonic() - start) / (args.minutes * 60)) < 1:
        cosine = 0.5 * (1 + math.cos(math.pi * part)) * (1 - FINAL_RATE) + FINAL_RATE
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * min(1, (step + 1) / WARMUP_STEPS) * cosine
        is_long = step % LONG_EVERY == LONG_EVERY - 1
        length = args.window * (LONG_FACTOR if is_long else 1)
        batch = max(1, args.batch // (LONG_FACTOR if is_long else 1))
        starts = torch.randint(0, ids.numel() - length, (batch,), generator=generator)
        x = torch.stack([ids[i : i + length] for i in starts.tolist()]).long()
        x[:, 0] = COMMON["bos_token_id"]
        x = x.to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=not args.fp32):
            loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + batch * length
        value = float(loss.detach())
        mean_loss = value if step == 1 else 0.98 * mean_loss + 0.02 * value
        if step % 50 == 0:
            rate = tokens / (time.monotonic() - start)
            print(f"step {step}  {part:.0%}  loss {mean_loss:.3f}  {rate:.0f} tokens/s", flush=True)
    print(f"{step} steps, {tokens} tokens, loss {mean_loss:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=("mla", "gqa", "mha"), required=True)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder to take it from")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="for a CPU without bfloat16 units")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    text = training_text(args.corpora)
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids, dtype=torch.int32)
    model = build(args.arch).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(ids)} tokens")
    train(model, ids, args)
    model.eval().to(torch.float16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
