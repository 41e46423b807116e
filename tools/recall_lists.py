"""Lists of codes and questions about them: what a model learns to recall from.

    python tools/recall_lists.py --tokenizer examples/models/tiny-mla --window 1024 --windows 292 \
        -o recall.txt

writes windows of exactly so many tokens, each a list and questions, to calibrate and to heal on.
`train_tiny.py` makes them as token ids, on the device that trains.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

KEYS = """amber birch cedar delta ember flint grove heron ivory jade kelp lotus maple noble olive
pearl quartz raven slate topaz umber violet willow zinc""".split()  # noqa: SIM905
OTHER, ANSWER = 1, 2  # kinds of tokens in a list; 0: not to be foreseen


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


def windows_of_text(tokenizer: PreTrainedTokenizerFast, window: int, count: int, seed: int) -> str:
    """So many windows as one text, from which the tokenizer makes the same windows again.

    The last token of each is a line end; where an entry is cut so that the text would be read in
    other tokens, another list is taken.
    """
    torch.manual_seed(seed)
    lists = RecallLists(tokenizer, "cpu")
    most = max(3, min(FULL.most, window // 9))  # an entry has eight tokens at most
    level = Level(0.0, window, FULL.words, FULL.values, most, FULL.double)
    rows: list[str] = []
    while len(rows) < count:
        for ids in lists.draw(8, level)[0].tolist():
            text = tokenizer.decode(ids[:-1]) + "\n"
            read = tokenizer.backend_tokenizer.encode(f"{text}Codes:").ids
            if read[: window - 1] == ids[:-1] and read[window:] == ids[: len(read) - window]:
                rows.append(text)
    return "".join(rows[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder to take it from")
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--windows", type=int, default=256, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    args.output.write_text(windows_of_text(tokenizer, args.window, args.windows, args.seed))


if __name__ == "__main__":
    main()
