"""A small `tiktoken.model` and its tokenizer_config.json, as Moonlight and Kimi ship them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import tiktoken
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from mla_deploy.spelling import byte_level_characters
from mla_deploy.tiktoken_model import PATTERNS

ESSAYS = Path(__file__).parents[2] / "examples" / "text" / "three-essays.txt"
CHINESE = "灯塔看守人说:你好,世界。今天的天气很好,我们去海边走走吧;明天再说。\n" * 20
NUMBERS = " ".join(str(number) for number in range(0, 3000, 7))
KIMI = "TikTokenTokenizer"
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 17: "<|im_middle|>"}
"""Special tokens, by their place after the ranks."""


@cache
def trained_tokens(count: int = 1500) -> tuple[bytes, ...]:
    """The tokens of a vocabulary by rank, learnt from English, Chinese and numbers."""
    learner = HfTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[KIMI]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spaces = "".join("\n" + " " * indent + "x" for indent in (2, 4, 8, 12) * 20)
    texts = [ESSAYS.read_text(encoding="utf-8"), CHINESE, NUMBERS, spaces]
    learner.train_from_iterator(texts, trainer)
    bytes_of = {character: byte for byte, character in enumerate(byte_level_characters())}
    ranks = learner.get_vocab()
    return tuple(
        bytes(bytes_of[character] for character in token)
        for token in sorted(ranks, key=ranks.__getitem__)
    )


def write_ranks(folder: Path, tokens: Sequence[bytes], **config: object) -> Path:
    """The two files, in a folder that may be there already."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    named = {
        str(len(tokens) + place): {"content": name, "special": place != 17}
        for place, name in NAMES.items()
    }
    written = {
        "tokenizer_class": KIMI,
        "added_tokens_decoder": named,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


def oracle(tokens: Sequence[bytes]) -> tiktoken.Encoding:
    """What the model's own Python class asks."""
    first = len(tokens)
    names = {first + place: f"<|reserved_token_{first + place}|>" for place in range(256)}
    names |= {first + place: name for place, name in NAMES.items()}
    return tiktoken.Encoding(
        "test",
        pat_str=PATTERNS[KIMI],
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={name: token_id for token_id, name in names.items()},
    )
