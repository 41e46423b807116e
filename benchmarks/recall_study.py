"""How many codes a model finds again by their keys, before and after conversion.

    python benchmarks/recall_study.py MODEL... --lengths 512 1024 2048 4090

Lists are those of `mla-deploy eval --key-value`, but each is read once and asked for several keys
at even depths, each question by itself: the reading is what takes the time. MODEL is the source,
which transformers computes, or a converted or quantised checkpoint, which the torch reference
computes, cache format included.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from mla_deploy.cache import pages_for
from mla_deploy.config_reader import read_json_object
from mla_deploy.evaluate.retrieval import make_trial
from mla_deploy.families import load_config
from mla_deploy.manifest import PAGE_TOKENS
from mla_deploy.model import empty_cache, load_model
from mla_deploy.tokenizer import Tokenizer

CHUNK = 8 * PAGE_TOKENS
Ask = Callable[[Sequence[int]], torch.Tensor]
"""Logits [vocab_size] behind a question; what was asked before is not seen."""
Reader = Callable[[Sequence[int]], Ask]


@torch.no_grad()
def source_reader(path: Path) -> Reader:
    from transformers import AutoModelForCausalLM

    model = cast(Any, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).eval()

    @torch.no_grad()
    def read(ids: Sequence[int]) -> Ask:
        past = model.model(torch.tensor([ids]), use_cache=True).past_key_values

        @torch.no_grad()
        def ask(question: Sequence[int]) -> torch.Tensor:
            own = copy.deepcopy(past)
            return model(torch.tensor([question]), past_key_values=own).logits[0, -1]

        return ask

    return read


def converted_reader(path: Path) -> Reader:
    config, model = load_config(path), load_model(path)

    @torch.no_grad()
    def step(ids: Sequence[int], past: int, cache: Any) -> tuple[torch.Tensor, Any]:
        table = torch.arange(1, pages_for(past + len(ids)) + 1).unsqueeze(0)
        new, last = torch.tensor([len(ids)]), torch.tensor([[len(ids) - 1]])
        logits, cache = model(torch.tensor([ids]), torch.tensor([past]), new, table, last, cache)
        return logits[0, 0], cache

    def read(ids: Sequence[int]) -> Ask:
        cache: Any = empty_cache(config, pages_for(len(ids) + PAGE_TOKENS) + 1)
        for begin in range(0, len(ids), CHUNK):
            _, cache = step(ids[begin : begin + CHUNK], begin, cache)
        return lambda question: step(question, len(ids), cache)[0]

    return read


def lists(
    tokenizer: Tokenizer, length: int, count: int, keys: int
) -> list[tuple[list[int], list[tuple[list[int], int]]]]:
    """Each list's tokens, and its questions with the token that answers."""
    draw, found = random.Random(f"recall {length}"), []
    for _ in range(count):
        told, _, _ = make_trial(tokenizer, "key-value", length, 0.0, draw).prompt.rpartition("; ")
        entries = [one.strip().split(" is ") for one in told.removeprefix("Codes:").split(";")]
        asked = []
        for number in range(keys):
            key, value = entries[round(number / max(1, keys - 1) * (len(entries) - 1))]
            question = tokenizer.encode(f" {key} is", add_special_tokens=False)
            (answer,) = tokenizer.encode(f" {value}", add_special_tokens=False)
            asked.append((question, answer))
        found.append((tokenizer.encode(f"{told};"), asked))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4090])
    parser.add_argument("--lists", type=int, default=12, help="of each length")
    parser.add_argument("--keys", type=int, default=10, help="asked of each list")
    args = parser.parse_args()
    print("| model | tokens | questions | right | answer, nats | right by depth |")
    print("|---|---|---|---|---|---|")
    for path in args.models:
        kind = read_json_object(path / "config.json")["model_type"]
        reader = converted_reader(path) if kind == "mla_deploy" else source_reader(path)
        tokenizer = Tokenizer.open(path)
        for length in args.lengths:
            right, nats = [], 0.0
            for ids, asked in lists(tokenizer, length, args.lists, args.keys):
                ask = reader(ids)
                for question, answer in asked:
                    logits = ask(question)
                    right.append(int(logits.argmax()) == answer)
                    nats -= float(logits.log_softmax(-1)[answer]) / (args.lists * args.keys)
            by_depth = [sum(right[at :: args.keys]) for at in range(args.keys)]
            share = sum(right) / len(right)
            row = f"{path.name} | {length} | {len(right)} | {share:.1%} | {nats:.3f} | {by_depth}"
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
