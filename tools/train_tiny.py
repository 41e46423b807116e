"""Train the small models that tests and studies convert, quantise and run.

    python tools/train_tiny.py --arch gqa --corpora FOLDER --tokenizer examples/models/tiny-mla \
        --minutes 60 -o examples/models/tiny-llama

The text is books, WikiText-2 (validation), GSM8K (train) and synthetic key-value recall, so that a
model has something to look up far back; the WikiText-2 and GSM8K test sets are left for tests.

A tiny model reads all of that as text and does not learn to recall. The size `base` (15 M) does, on
a GPU within minutes:

    python tools/train_tiny.py --size base --device cuda --compile --minutes 4 --arch mla ...

Lists as the key-value test of `mla-deploy eval` has them are made as token ids for each step, and
only the answers to questions count much in their loss. The lists grow: at first few names, few
values and short windows, because looking up is learnt all of a sudden, and the sooner the fewer
there are. The next level comes when nine answers of ten are right. The first layer begins with
heads that look a few places back. `--size small` shows it on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from recall_lists import ANSWER, FULL, LEVELS, OTHER, RecallLists, recall
from tiny_models import COMMON, SIZES, build
from transformers import PreTrainedTokenizerFast

BOOKS = ("sherlock.txt", "wizard_of_oz.txt", "tinyshakespeare.txt")
RECALLS = 16_000
LONG_EVERY, LONG_FACTOR = 10, 8
"""Every tenth step has windows eight times as long, so that long positions are trained too."""
WARMUP_STEPS, FINAL_RATE = 100, 0.05
MASTERED, PATIENCE, PASSED, LOWER = 0.9, 600, 0.7, 0.3
"""Share of right answers that ends a level; after so many steps a smaller one does, which is still
above guessing; share of steps that go back to one of the last three levels."""
LOOK_EVERY, REPORT_SECONDS = 20, 10
PROBES = ((4, False), (24, False), (12, True), (40, True), (120, True), (270, True), (540, True))
OTHER_WEIGHT, ALONE_BELOW = 0.1, 1024
"""Windows shorter than this train answers alone: any other loss puts off the turn."""


def training_text(corpora: Path, recalls: int = RECALLS) -> str:
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
    parts.append("\n".join(recall(generator) for _ in range(recalls)))
    pieces = [part[i : i + 4000] for part in parts for i in range(0, len(part), 4000)]
    generator.shuffle(pieces)
    return "\n".join(pieces)


class Muon(torch.optim.Optimizer):
    """Steps along orthogonalised momentum (https://kellerjordan.github.io/posts/muon).

    In float32 on a CPU: `torch.optim.Muon` computes in bfloat16, which takes forty times as long
    without units for it. Matrices of one shape are computed together.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                grads = [p.grad for p in same]
                averages = [self.state[p].setdefault("average", torch.zeros_like(p)) for p in same]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                torch._foreach_lerp_(grads, averages, group["momentum"])
                updates = orthogonal(torch.stack(grads)).to(same[0].dtype).unbind()
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                # About as large as a step of AdamW, so that one rate fits both.
                torch._foreach_add_(same, updates, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T of each singular value decomposition, by five steps of Newton and Schulz."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def make_optimizers(model: Any, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for matrices and AdamW for the rest."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": [embedding], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [
        Muon(matrices, {"lr": args.rate, "weight_decay": 0.1, "momentum": 0.95}),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=args.device == "cuda"),
    ]


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float, part: float, step: int) -> None:
    """By the part of the time that has passed: a cosine behind a short rise."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, part))) * (1 - FINAL_RATE) + FINAL_RATE
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARMUP_STEPS) * cosine


def take_step(model: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Windows of text; a cosine schedule over the time given."""
    optimizers = make_optimizers(model, args)
    generator = torch.Generator().manual_seed(1)
    start, step, tokens, mean_loss = time.monotonic(), 0, 0, math.nan
    while (part := (time.monotonic() - start) / (args.minutes * 60)) < 1:
        set_rate(optimizers, args.rate, part, step)
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
        take_step(model, optimizers)
        step, tokens = step + 1, tokens + batch * length
        value = float(loss.detach())
        mean_loss = value if step == 1 else 0.98 * mean_loss + 0.02 * value
        if step % 50 == 0:
            rate = tokens / (time.monotonic() - start)
            print(f"step {step}  {part:.0%}  loss {mean_loss:.3f}  {rate:.0f} tokens/s", flush=True)
    print(f"{step} steps, {tokens} tokens, loss {mean_loss:.3f}")


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[rows, window, hidden_size]. transformers' own forward would make a mask of window^2 bytes
    for some versions, which keeps flash attention away; a causal one needs none."""
    inner = model.model
    x = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotations = inner.rotary_emb(x, positions)
    for layer in inner.layers:
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotations)
    return inner.norm(x)


def losses(
    hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, kinds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean nats of answers and of other tokens, and the share of answers that are right."""
    targets = ids.roll(-1, 1).flatten()
    kinds = kinds.roll(-1, 1)
    kinds = kinds.masked_fill(torch.arange(ids.shape[1], device=ids.device) == ids.shape[1] - 1, 0)
    answer, other = ((kinds == kind).flatten().float() for kind in (ANSWER, OTHER))
    logits = F.linear(hidden, head).flatten(0, 1).float()
    nats = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets).float()
    asked = answer.sum().clamp(min=1)
    return (
        (nats * answer).sum() / asked,
        (nats * other).sum() / other.sum().clamp(min=1),
        (right * answer).sum() / asked,
    )


def train_recall(
    model: Any, ids: torch.Tensor, lists: RecallLists, args: argparse.Namespace
) -> None:
    """Lists that grow and text, in every step; a cosine schedule over the time given."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    optimizers, measure = make_optimizers(model, args), losses
    if args.compile:
        torch._dynamo.config.suppress_errors = True  # a layer that does not compile runs as it is
        torch._dynamo.config.recompile_limit = 32
        measure = torch.compile(losses, dynamic=False)
        for layer in model.model.layers:  # one by one: alike, so that one compilation serves all
            layer.compile(dynamic=False)
    head, on = model.lm_head.weight, {"device": args.device}
    ids, generator = ids.to(args.device), random.Random(2)
    mean = torch.zeros(4, **on)  # loss of text, of answers, of the rest; right answers
    start = told = time.monotonic()
    step, tokens, at, entered = 0, 0, 0, 0
    while (part := (time.monotonic() - start) / (args.minutes * 60)) < 1 and not stop:
        set_rate(optimizers, args.rate, part, step)
        back = at > 0 and generator.random() < LOWER
        level = LEVELS[generator.randrange(max(0, at - 3), at) if back else at]
        rows = max(1, round(args.tokens * args.recall_share) // level.window)
        x, kinds = lists.draw(rows, level)
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=not args.fp32):
            answer, other, right = measure(hidden_states(model, x), head, x, kinds)
        alone = level.window < ALONE_BELOW
        (answer if alone else answer + OTHER_WEIGHT * other).backward()
        seen, text = x.numel(), torch.zeros((), **on)
        if args.recall_share < 1 and not alone:
            length = max(args.window, level.window)
            rows = max(1, round(args.tokens * (1 - args.recall_share)) // length)
            begin = torch.randint(0, ids.numel() - length, (rows, 1), **on)
            x = ids[begin + torch.arange(length, **on)].long()
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=not args.fp32):
                _, text, _ = measure(hidden_states(model, x), head, x, torch.ones_like(x))
            text.backward()
            seen += x.numel()
        take_step(model, optimizers)
        step, tokens = step + 1, tokens + seen
        if not back:
            now = torch.stack([text, answer, other, right]).detach()
            mean = now if step == 1 else torch.lerp(mean, now, 0.05)
        if step % LOOK_EVERY:
            continue
        if at + 1 < len(LEVELS):
            stayed = step - entered
            enough = MASTERED if stayed < PATIENCE else PASSED
            learnt = stayed >= 2 * LOOK_EVERY and float(mean[3]) > enough
            if learnt or part >= LEVELS[at + 1].by:
                at, entered = at + 1, step
                mean[3] = 0
                why = "learnt" if learnt else "time"
                print(f"step {step}  {part:.0%}  level {at} ({why}): {LEVELS[at]}", flush=True)
        if time.monotonic() - told > REPORT_SECONDS or step == LOOK_EVERY:
            told = time.monotonic()
            speed = tokens / (told - start)
            text_loss, answers, rest, share = mean.tolist()
            print(
                f"step {step}  {part:.0%}  {tokens / 1e6:.1f} M tokens, {speed:.0f}/s  "
                f"level {at}  loss: text {text_loss:.3f}, answers {answers:.3f}, rest {rest:.3f}  "
                f"right {share:.2f}  {probe(model, lists, args, LEVELS[at].most)}",
                flush=True,
            )
    print(f"{step} steps, {tokens} tokens, {tokens / (time.monotonic() - start):.0f}/s", flush=True)


@torch.no_grad()
def probe(model: Any, lists: RecallLists, args: argparse.Namespace, most: int) -> str:
    """Share of right answers on fresh lists by their length; `x2`: names of two words."""
    found, told = [], []
    for count, double in PROBES:
        if count > 2 * most:
            continue
        window = min(4096, 8 * count + 64)
        counts = torch.full((max(1, min(64, 32768 // window)),), count, device=args.device)
        x, kinds = lists.make(
            counts, torch.full_like(counts, double, dtype=torch.bool), window, FULL
        )
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autocast(args.device, dtype=torch.bfloat16, enabled=not args.fp32),
        ):
            found.append(losses(hidden_states(model, x), model.lm_head.weight, x, kinds)[2])
        told.append(f"{count}{'x2' if double else ''}")
    shares = torch.stack(found).tolist()
    return " ".join(f"{name}:{share:.2f}" for name, share in zip(told, shares, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=("mla", "gqa", "mha"), required=True)
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="tiny", help="small and base learn to recall"
    )
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder to take it from")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="of training, compiling included")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step (tiny)")
    parser.add_argument("--window", type=int, help="256, or 1024 for base: tokens of a text")
    parser.add_argument("--tokens", type=int, default=32768, help="in a step (small, base)")
    parser.add_argument(
        "--recall-share", type=float, default=0.5, help="of a step's tokens (small, base)"
    )
    parser.add_argument("--text", type=Path, help="more text (small, base)")
    parser.add_argument("--compile", action="store_true", help="with torch.compile (small, base)")
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000, help="of a weights file")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="for a CPU without bfloat16 units")
    args = parser.parse_args()
    if not 0 < args.recall_share <= 1:
        parser.error(f"--recall-share is {args.recall_share}; above 0, up to 1")
    if args.size == "tiny" and (args.compile or args.text):
        parser.error("--compile and --text are for the sizes small and base")
    args.window = args.window or (1024 if args.size == "base" else 256)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    text = training_text(args.corpora, RECALLS if args.size == "tiny" else 0)
    if args.text:
        text += "\n" + args.text.read_text()
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids, dtype=torch.int32)
    model = build(args.arch, args.size).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(ids)} tokens")
    lists = RecallLists(tokenizer, args.device)
    if args.size == "tiny":
        train(model, ids, args)
    else:
        train_recall(model, ids, lists, args)
    model = model.eval().to(torch.float16)
    model.save_pretrained(args.output, max_shard_size=args.shard_bytes)
    tokenizer.save_pretrained(args.output)
    if args.size != "tiny":  # the weights as they are saved
        print(f"saved  {probe(model.float(), lists, args, FULL.most)}", flush=True)


if __name__ == "__main__":
    main()
