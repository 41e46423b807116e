"""Texts, tokens and windows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.text import Corpus, check_window, encode_text, read_text, windows
from mla_deploy.tokenizer import Tokenizer

START = 9999


def corpus(length: int, start: int = 0) -> Corpus:
    return Corpus((START,) * start, tuple(range(length)), (1,) * length)


@given(
    length=st.integers(2, 200),
    window=st.integers(2, 60),
    stride=st.integers(1, 60),
    start=st.integers(0, 2),
)
def test_each_token_is_scored_once_in_the_first_window_that_can(
    length: int, window: int, stride: int, start: int
) -> None:
    room = window - start
    if room < 2 or stride > room:
        return
    scored: list[int] = []
    for index, part in enumerate(windows(corpus(length, start), window, stride)):
        assert len(part.ids) <= window
        assert part.ids[:start] == (START,) * start
        assert part.first >= 1, "a token with nothing before it cannot be scored"
        targets = list(part.ids[part.first :])
        assert targets[0] == part.offset
        if index:
            assert part.first >= room - stride + start or part.first == 1
        scored += targets
    expected = set(range(length))
    if not start:
        # Nothing stands before the first token of the text, nor of windows that do not overlap.
        expected -= set(range(0, length, stride)) if stride == room else {0}
    assert scored == sorted(expected)


def test_windows_are_those_of_the_usual_sliding_window() -> None:
    # The loop of the transformers documentation ("Perplexity of fixed-length models"): the labels
    # of a window are its last `end - previous_end` tokens, shifted by one.
    length, window, stride = 1000, 128, 48
    expected = []
    previous_end = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        wanted = end - previous_end
        labels = [None] * (end - begin - wanted) + list(range(previous_end, end))
        expected.append((range(begin, end), labels[1:]))
        previous_end = end
        if end == length:
            break
    found = [
        (part.ids, [None] * (part.first - 1) + list(part.ids[part.first :]))
        for part in windows(corpus(length), window, stride)
    ]
    assert found == [(tuple(ids), labels) for ids, labels in expected]


def test_default_window_is_512_or_the_context() -> None:
    assert check_window(None, None, [4096], 0) == (512, 512)
    assert check_window(None, None, [4096, 100], 0) == (100, 100)
    assert check_window(None, None, [4096], 1) == (512, 511)
    assert check_window(64, 16, [4096], 1) == (64, 16)


@pytest.mark.parametrize(
    ("window", "stride"), [(1, None), (4097, None), (64, 0), (64, 65), (0, None)]
)
def test_windows_out_of_range_are_refused(window: int, stride: int | None) -> None:
    with pytest.raises(UsageError, match="out of range"):
        check_window(window, stride, [4096], 0)


def test_bytes_of_tokens_add_up_to_the_text(tiny_mla: Path) -> None:
    text = "Bread, naïve café, 日本語 and 🙂.\r\n"
    found = encode_text(Tokenizer.open(tiny_mla), text)
    assert sum(found.token_bytes) == len(text.encode())
    assert found.start == ()


def test_the_tokens_that_a_tokenizer_puts_before_a_text_are_kept_apart(
    tiny_mla: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_mla / "tokenizer.json", tmp_path)
    config = json.loads((tiny_mla / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.open(tmp_path)
    found = encode_text(tokenizer, "The river finds its way.")
    assert found.start == (tokenizer.bos_token_id,)
    assert tokenizer.bos_token_id not in found.ids
    assert not set(tokenizer.eos_token_ids) & set(found.ids)


def test_max_tokens_takes_the_start_of_the_text(tiny_mla: Path) -> None:
    tokenizer = Tokenizer.open(tiny_mla)
    whole = encode_text(tokenizer, "The river finds its way to the sea.")
    assert encode_text(tokenizer, "The river finds its way to the sea.", 4).ids == whole.ids[:4]


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(tmp_path / "text") == "one\r\ntwo\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"caf\xe9", "byte 0xe9 at offset 3")],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_text(tmp_path / "text")
    assert message in str(caught.value)


def test_a_missing_text_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_text(path)


def test_a_single_token_is_too_short(tiny_mla: Path) -> None:
    with pytest.raises(UsageError, match="too short"):
        encode_text(Tokenizer.open(tiny_mla), "a")
