"""The lists that tools/train_tiny.py trains on are those that the key-value test asks about."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mla_deploy.evaluate.retrieval import WORDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def train_tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "tools/train_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(ROOT / "examples/models/tiny-mla")


def test_names_are_those_of_the_evaluation(train_tiny: ModuleType) -> None:
    assert tuple(train_tiny.KEYS) == WORDS


@pytest.mark.parametrize(
    ("count", "double", "window"), [(3, False, 32), (24, False, 256), (12, True, 128)]
)
def test_lists_have_the_tokens_of_their_text(
    train_tiny: ModuleType,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    double: bool,
    window: int,
) -> None:
    torch.manual_seed(0)
    lists = train_tiny.RecallLists(tokenizer, "cpu")
    counts = torch.full((5,), count)
    ids, kinds = lists.make(counts, torch.full((5,), double), window, train_tiny.FULL)
    for row, kind in zip(ids, kinds, strict=True):
        text = tokenizer.decode(row)
        encoded = tokenizer.backend_tokenizer.encode(text).ids
        assert encoded[:-4] == row[:-4].tolist()  # the end may be cut
        # Each answer is what the list says, and each entry of the list is told once.
        entries = [one.strip() for one in text.removeprefix("Codes:").split(";")][:-1]
        told = dict(entry.split(" is ") for entry in entries[:count])
        assert len(told) == count
        asked = [entry.split(" is ") for entry in entries[count:]]
        assert asked
        assert all(told[name] == value for name, value in asked)
        assert 0 <= int((kind == train_tiny.ANSWER).sum()) - len(asked) <= 1
