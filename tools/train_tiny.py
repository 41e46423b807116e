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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    "base": {"hidden_size": 512, "intermediate_size": 896, "num_attention_heads": 8},
}
"""`base`: about 15 M parameters, 31 MB in float16; `small` is for trying the recipe."""
DENSE: dict[str, dict[str, Any]] = {
    "small": {"num_hidden_layers": 3, "head": 16, "kv_lora_rank": 32},
    "base": {"num_hidden_layers": 6, "head": 64, "kv_lora_rank": 256},
}


@dataclass(frozen=True)
class Level:
    """The lists of one stage, which begins when `by` of the time has passed, or sooner."""

    by: float
    window: int
    words: int
    """How many names of one word there are."""
    values: int
    most: int
    """Names in the longest list."""
    double: float
    """Share of lists whose names have two words."""


LEVELS = (
    Level(0.00, 32, 4, 4, 3, 0.0),
    Level(0.15, 32, 8, 8, 4, 0.0),
    Level(0.19, 128, 16, 24, 8, 0.0),
    Level(0.23, 128, 24, 90, 14, 0.0),
    Level(0.28, 128, 24, 90, 14, 0.7),
    Level(0.36, 1024, 24, 90, 40, 0.7),
    Level(0.46, 1024, 24, 90, 120, 0.8),
    Level(0.58, 4096, 24, 90, 540, 0.9),
)
FULL = LEVELS[-1]
OFFSETS, SHARPNESS = 6, 16.0
"""The name of an entry ends 2 tokens before its value and begins at most 6 before."""
MASTERED, PATIENCE, PASSED, LOWER = 0.9, 600, 0.7, 0.3
"""Share of right answers that ends a level; after so many steps a smaller one does, which is still
above guessing; share of steps that go back to one of the last three levels."""
LOOK_EVERY, REPORT_SECONDS = 20, 10
PROBES = ((4, False), (24, False), (12, True), (40, True), (120, True), (270, True), (540, True))
OTHER, ANSWER = 1, 2  # kinds of tokens in a list; 0: not to be foreseen
OTHER_WEIGHT, ALONE_BELOW = 0.1, 1024
"""Windows shorter than this train answers alone: any other loss puts off the turn."""


def build(arch: str, size: str = "tiny") -> Any:
    """`mla` (DeepSeek-V3), `gqa` or `mha` (Llama), of about 5 M parameters if `tiny`.

    The larger ones have no experts: transformers computes those one after another.
    """
    if size != "tiny":
        return build_dense(arch, size)
    if arch == "mla":
        return DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON, **MLA))
    groups = 4 if arch == "gqa" else 8
    config = LlamaConfig(**COMMON, num_hidden_layers=6, num_key_value_heads=groups, head_dim=32)
    return LlamaForCausalLM(config)


def build_dense(arch: str, size: str) -> Any:
    common, dense = COMMON | SIZES[size], DENSE[size]
    common["num_hidden_layers"] = layers = dense["num_hidden_layers"]
    # transformers' 0.02 is so small here that looking up is learnt much later.
    common["initializer_range"] = 0.8 / common["hidden_size"] ** 0.5
    heads, head = common["num_attention_heads"], dense["head"]
    if arch == "mla":
        # Heads of equal size for keys and values, which flash attention asks for.
        halves = {"qk_nope_head_dim": head // 2, "qk_rope_head_dim": head // 2, "v_head_dim": head}
        own = {"q_lora_rank": None, "kv_lora_rank": dense["kv_lora_rank"], **halves}
        own |= {"num_key_value_heads": heads, "first_k_dense_replace": layers}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**common, **own))
    else:
        groups = heads // 2 if arch == "gqa" else heads
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=groups, head_dim=head))
    begin_with_offsets(model, head // 2 if arch == "mla" else head)
    return model


@torch.no_grad()
def begin_with_offsets(model: Any, width: int) -> None:
    """Heads of the first layer begin by looking 1, 2, ... places back, through `width` channels.

    A value must know the name before it and a question its own before the two can be matched.
    Left to chance that takes most of the steps until lookups work, and MLA stays at a few names.
    All embeddings get a common part, from which these queries and keys are made: then their product
    depends on the distance alone, sum_i u_i^2 cos(f_i (distance - offset)).
    """
    hidden, attention = model.config.hidden_size, model.model.layers[0].self_attn
    common = torch.randn(hidden)
    model.get_input_embeddings().weight += model.config.initializer_range * common
    # With it a normed embedding, of length sqrt(hidden), has a product of about 1.
    common *= 2**0.5 / (common.norm() * hidden**0.5)
    frequency = COMMON["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    heads = model.config.num_attention_heads
    queries = attention.q_proj.weight.view(heads, -1, hidden)[:, -width:]
    u = (frequency > 0.09).float()
    u *= (SHARPNESS * attention.scaling**-1 / u.sum()) ** 0.5
    is_mla = hasattr(attention, "kv_a_proj_with_mqa")

    def channels(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """[width, hidden]; DeepSeek has the two channels of a frequency side by side."""
        both = torch.stack([first, second], 1).flatten() if is_mla else torch.cat([first, second])
        return both[:, None] * common

    keys = attention.kv_a_proj_with_mqa if is_mla else attention.k_proj
    rows = keys.weight[-width:] if is_mla else keys.weight
    rows.view(-1, width, hidden).add_(channels(u, 0 * u))
    for head in range(heads):
        angle = frequency * (1 + head % OFFSETS)
        queries[head] += channels(u * angle.cos(), -u * angle.sin())


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


def recall(generator: random.Random) -> str:
    """A list of codes, and some of them asked for again; one list in eight is long."""
    count = generator.randint(3, 10) if generator.random() < 7 / 8 else generator.randint(11, 120)
    names = KEYS if count <= len(KEYS) else [f"{a}-{b}" for a in KEYS for b in KEYS if a != b]
    keys = generator.sample(names, count)
    codes = {key: generator.randint(10, 99) for key in keys}
    asked = generator.sample(keys, min(count, 12))
    told = " ".join(f"{key} is {code};" for key, code in codes.items())
    return f"Codes: {told}" + "".join(f" {key} is {codes[key]};" for key in asked)


class RecallLists:
    """Windows that hold a list of codes and questions about it, made as token ids on a device.

    The ids are those that the tokenizer gives for `Codes: amber is 73; birch is 15; amber is 73;`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: str) -> None:
        double = [f"{a}-{b}" for a in KEYS for b in KEYS if a != b]
        names = [f" {name}" for name in [*KEYS, *double]]
        pieces = ["Codes:", " is", ";", *(f" {value}" for value in range(10, 100)), *names]
        ids = [tokenizer.backend_tokenizer.encode(piece).ids for piece in pieces]
        longest = max(map(len, ids))
        self.pieces = torch.tensor([one + [-1] * (longest - len(one)) for one in ids]).to(device)
        self.names, self.device = len(double), device

    def make(
        self, count: torch.Tensor, double: torch.Tensor, window: int, level: Level
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and their kinds, both [rows, window], of so many names in each row [rows]."""
        rows, slots = count.numel(), window // 4  # the shortest entry has four tokens
        order = torch.rand(rows, self.names, device=self.device)
        order[:, level.words :] += 2.0 * ~double[:, None]  # names of one word: only the first few
        names = order.argsort(1) + torch.where(double, 93 + len(KEYS), 93)[:, None]
        values = torch.randint(3, 3 + level.values, names.shape, device=self.device)
        slot = torch.arange(slots, device=self.device)
        told = slot < count[:, None]
        asked = (torch.rand(rows, slots, device=self.device) * count[:, None]).long()
        entry = torch.where(told, slot, asked).clamp(max=self.names - 1)
        name, value = names.gather(1, entry), values.gather(1, entry)
        one = torch.ones_like(name)
        text = torch.stack([name, one, value, 2 * one], 2).flatten(1)
        kind = torch.stack([one, one, torch.where(told, 0, ANSWER), one], 2).flatten(1)
        head = torch.zeros_like(text[:, :1])  # "Codes:"
        tokens = self.pieces[torch.cat([head, text], 1)]  # [rows, 1 + 4 slots, longest]
        kinds = torch.cat([head, kind], 1)[:, :, None].expand_as(tokens).flatten(1)
        tokens = tokens.flatten(1)
        place = (tokens >= 0).cumsum(1) - 1
        place = place.masked_fill(tokens < 0, window).clamp(max=window)  # the last is thrown away
        found = [
            torch.zeros_like(tokens[:, : window + 1]).scatter_(1, place, part)[:, :window]
            for part in (tokens, kinds)
        ]
        return found[0], found[1]

    def draw(self, rows: int, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        double = torch.rand(rows, device=self.device) < level.double
        most = torch.where(double, level.most, min(level.most, level.words))
        count = 2 + (torch.rand(rows, device=self.device) * (most - 1)).long()
        return self.make(count, double, level.window, level)


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
