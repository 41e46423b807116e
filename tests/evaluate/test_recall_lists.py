"""The lists that tools/recall_lists.py makes are those that the key-value test asks about."""

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
def recall_lists() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recall_lists", ROOT / "tools/recall_lists.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall_lists"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(ROOT / "examples/models/tiny-mla")


def test_names_are_those_of_the_evaluation(recall_lists: ModuleType) -> None:
    assert tuple(recall_lists.KEYS) == WORDS


@pytest.mark.parametrize(
    ("count", "double", "window"), [(3, False, 32), (24, False, 256), (12, True, 128)]
)
def test_lists_have_the_tokens_of_their_text(
    recall_lists: ModuleType,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    double: bool,
    window: int,
) -> None:
    torch.manual_seed(0)
    lists = recall_lists.RecallLists(tokenizer, "cpu")
    counts = torch.full((5,), count)
    ids, kinds = lists.make(counts, torch.full((5,), double), window, recall_lists.FULL)
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
        assert 0 <= int((kind == recall_lists.ANSWER).sum()) - len(asked) <= 1


def test_windows_are_read_as_they_were_written(
    recall_lists: ModuleType, tokenizer: PreTrainedTokenizerFast
) -> None:
    window, count = 96, 7
    text = recall_lists.windows_of_text(tokenizer, window, count, seed=1)
    ids = tokenizer.backend_tokenizer.encode(text).ids
    assert len(ids) == window * count
    for begin in range(0, len(ids), window):
        assert tokenizer.decode(ids[begin : begin + window]).startswith("Codes: ")
