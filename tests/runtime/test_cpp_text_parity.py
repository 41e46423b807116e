"""Encoding and decoding in C++ against the package tokenizers, on tokenizers of real models."""

from __future__ import annotations

import gzip
import os
import random
from functools import cache
from pathlib import Path

import pytest
from cpp.text_abi import FULL, CppTokenizer, load_text, some_characters
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "tiny-mla": "models/tiny-mla",
    "deepseek": "tokenizers/deepseek-llm-100k-hf",
    "stories260K": "models/stories260K",
    "babyllama105": "models/babyllama105",
}


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    load_text()


@cache
def load(path: Path) -> tuple[CppTokenizer, Tokenizer]:
    return CppTokenizer(path), Tokenizer.from_file(str(path))


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tiny_mla: Path) -> tuple[CppTokenizer, Tokenizer]:
    """Ours and theirs."""
    if request.param == "tiny-mla":
        return load(tiny_mla / "tokenizer.json")
    path = request.getfixturevalue("shared") / "data" / MODELS[request.param] / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return load(path)


def assert_same(pair: tuple[CppTokenizer, Tokenizer], text: str) -> list[int]:
    ours, theirs = pair
    for special in (False, True):
        ids = theirs.encode(text, add_special_tokens=special).ids
        found = ours.encode(text, special)
        if found != ids:
            at = next((i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), 0)
            begin = theirs.decode(ids[:at])[-40:]
            pytest.fail(
                f"token {at}, after {begin!r}: {found[at : at + 6]}, not {ids[at : at + 6]}"
            )
    for skip in (False, True):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    return ids


def corpora(shared: Path) -> list[tuple[str, str]]:
    texts = []
    for path in sorted((shared / "data" / "corpora").rglob("*")):
        if path.is_file():
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                data = file.read(2_000_000 if FULL else 60_000)
            texts.append((path.name, data.decode(errors="ignore")))
    return texts


def test_corpora(pair: tuple[CppTokenizer, Tokenizer], shared: Path) -> None:
    for name, text in corpora(shared):
        print(name, len(assert_same(pair, text)))


def test_one_corpus(pair: tuple[CppTokenizer, Tokenizer]) -> None:
    for path in sorted((ROOT / "examples" / "text").iterdir()):
        assert_same(pair, path.read_text())


# ---- odd text ----------------------------------------------------------------------------------

SPACES = "\t\n\v\f\r \x85\xa0\u1680\u180e\u2000\u2009\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
PIECES = [
    "the", "The ", "don't", "I'LL", "we'ſ", "'Re", "12345", "٣٤٥", "½", "Ⅷ", "中文字", "ひらがな", "カタカナ", "한국어",
    "нет", "é", "e\u0301", "ﬁ", "ß", "ſ", "\u0345", "नमस्ते", "👩‍👩‍👧‍👦", "🇩🇪", "\u200d", "\ufffd", "\x00", "\x1b[0m", "\r\n",
    "\n\n\n", "    ", "\t\t", "!!!", "?!...", "—", "「」", "#include <a.h>", "<s>", "</s>", "<unk>", "<|bos|>",
    "<|eos|>", "<|bo", "<｜begin▁of▁sentence｜>", "<0x0A>", "<0x", "▁", "▁▁the", "Ġ", "ø", "öh",
    "\U00031350", "\U00010d4a", "\u0897", "\U000e0001", "\U0010ffff", "\ue000", "\u0378", *SPACES,
]  # fmt: skip
ANY_CHARACTER = st.characters(exclude_categories=["Cs"])  # all planes, control and unassigned too
RANDOM_TEXT = st.one_of(
    st.text(ANY_CHARACTER, max_size=60),
    st.lists(st.one_of(st.sampled_from(PIECES), ANY_CHARACTER), max_size=30).map("".join),
    st.text(st.sampled_from("ab '▁ 1!\n中é"), max_size=40),
    st.text(st.characters(categories=["Mn", "Mc", "Me", "Lm", "Cf"]), max_size=30),
)


@settings(max_examples=1000 if FULL else 100, deadline=None)
@given(text=RANDOM_TEXT)
@pytest.mark.parametrize("name", MODELS)
def test_random_text(name: str, text: str) -> None:
    path = ROOT / "examples" / "models" / "tiny-mla" / "tokenizer.json"
    if name != "tiny-mla":
        shared = os.environ.get("MLA_DEPLOY_SHARED", ROOT.parent / "shared")
        path = Path(shared) / "data" / MODELS[name] / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    assert_same(load(path), text)


def test_characters_between_others(pair: tuple[CppTokenizer, Tokenizer]) -> None:
    """Each as part of a word, of a contraction, of punctuation and of white space."""
    characters = some_characters()
    for begin in range(0, len(characters), 0x8000):
        block = characters[begin : begin + 0x8000]
        assert_same(pair, "".join(f"a{c}b '{c} ,{c}1 {c} \n" for c in block))


@pytest.mark.parametrize(
    "piece", ["a", " ", "\n", "ab", "1", "!", "é", "中", "👍", "▁", " \n", "\t a"]
)
def test_long_runs(pair: tuple[CppTokenizer, Tokenizer], piece: str) -> None:
    assert_same(pair, piece * 3_000)
    assert_same(pair, f"x{piece * 777}y {piece * 9}z")


def test_a_word_of_many_letters_takes_no_quadratic_time(
    pair: tuple[CppTokenizer, Tokenizer],
) -> None:
    ours, _ = pair
    order = random.Random(1)
    text = "".join(order.choices("etaoinshr", k=300_000))
    assert ours.decode(ours.encode(text)) == text


# ---- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
def test_streams_of_random_ids(pair: tuple[CppTokenizer, Tokenizer], skip: bool) -> None:
    ours, theirs = pair
    order = random.Random(5)
    bytes_of = [theirs.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    bytes_of = [id for id in bytes_of if id is not None]
    alone = [id for id in range(theirs.get_vocab_size()) if theirs.decode([id]) == "\ufffd"]
    pools = [range(ours.vocab_size + 20), [*range(5)], bytes_of, alone]
    for _ in range(60):
        ids: list[int] = []
        for _ in range(order.randrange(12)):
            pool = order.choice([p for p in pools if p])
            ids += order.choices(pool, k=order.randrange(6))
        full = ours.decode(ids, skip)
        assert full == theirs.decode(ids, skip_special_tokens=skip)
        pieces = list(ours.stream(skip).pieces(ids))
        assert "".join(piece.decode() for piece in pieces) == full  # each is UTF-8


def test_a_stream_holds_back_no_more_than_a_character(
    pair: tuple[CppTokenizer, Tokenizer],
) -> None:
    ours, theirs = pair
    if theirs.token_to_id("<0x0A>") is not None:
        pytest.skip("a run of bytes waits for its end")
    ids = ours.encode("naïve 中文 👍🏽 text")
    stream, seen = ours.stream(), b""
    for count in range(1, len(ids) + 1):
        seen += stream.push(ids[count - 1])
        assert seen.decode() == theirs.decode(ids[:count], False).rstrip("\ufffd")
    assert stream.flush() == b""
