"""A tokenizer.json made of `tiktoken.model`: ids as of tiktoken, in Python and in C++."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
from pathlib import Path

import pytest
from cpp.text_abi import CppTokenizer, load_text, some_characters
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import ESSAYS, KIMI, oracle, trained_tokens, write_ranks
from tokenizers import Tokenizer as HfTokenizer

from mla_deploy.errors import TokenizerError
from mla_deploy.tiktoken_model import MAX_BYTES, PATTERNS, tokenizer_of_ranks
from mla_deploy.tokenizer import Tokenizer

BYTES = [bytes([byte]) for byte in range(256)]
TEXTS = [
    "",
    "The keeper's lighthouse, DON'T you'LL we'd I'Ve x'ſ ''s",
    "你好世界hello世界World 々〇 〡 ㈱ 漢字かな交じり文",
    "1234567 12 ٣٤٥ ½²³ Ⅷ x1y22z333",
    "a  b   c\t\td \n\n  e\r\n\r\n f   ",
    "    def f(x):\n        return x\n\n\n",
    "😀👩\u200d👩\u200d👧 🇨🇭 ñ é Ǆ ǅ ʰ ª \u0301x",
    "!!! --- ,,,\n\n///\r ...\u3000\u00a0.\u2028x",
    "ABCdefGHI iOS McDonald ΑΒΓδεζ ЖЗи İıß",
    "[BOS]a<|im_end|>b<|im_middle|>[EOS]<|reserved_token_1509|><|im_end|",
]


class Three:
    """A vocabulary in Python, in C++ and in tiktoken."""

    def __init__(self, folder: Path, tokens: list[bytes]) -> None:
        write_ranks(folder, tokens)
        self.python = Tokenizer.open(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self.json = tokenizer_of_ranks(folder / "tiktoken.model", config)
        self.cpp = CppTokenizer(self.json)
        self.theirs = oracle(tokens)

    def check(self, text: str) -> None:
        ids = self.theirs.encode(text, allowed_special="all")
        assert self.python.encode(text) == ids, text
        assert self.cpp.encode(text, True) == ids, text
        assert self.python.decode(ids, skip_special_tokens=False) == text
        assert self.cpp.decode(ids) == text


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Three:
    load_text()
    return Three(tmp_path_factory.mktemp("learnt"), list(trained_tokens()))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Three:
    """Every two bytes are a token: its ids show where a text was cut, whatever is written there."""
    load_text()
    tokens = [*BYTES, *(first + second for first in BYTES for second in BYTES)]
    return Three(tmp_path_factory.mktemp("pairs"), tokens)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vocabulary", ["learnt", "pairs"])
def test_ids_are_those_of_tiktoken(
    request: pytest.FixtureRequest, vocabulary: str, text: str
) -> None:
    request.getfixturevalue(vocabulary).check(text)


def test_words_end_where_the_models_class_ends_them(tmp_path: Path) -> None:
    write_ranks(tmp_path, BYTES)
    made = tokenizer_of_ranks(tmp_path / "tiktoken.model", {"tokenizer_class": KIMI})
    words = ["It's", "hello", "世界々", "World", "IOS", "-Ab", " ", "你", "123", "4", " --\n", "  "]
    words += [" x", " \n"]
    cuts = HfTokenizer.from_str(made).pre_tokenizer.pre_tokenize_str("".join(words))
    assert ["".join(words)[begin:end] for _, (begin, end) in cuts] == words


def test_a_learnt_text_takes_many_kinds_of_tokens(learnt: Three) -> None:
    text = ESSAYS.read_text(encoding="utf-8")
    learnt.check(text)
    assert len(set(learnt.python.encode(text))) > 600
    merges = json.loads(learnt.json)["model"]["merges"]
    assert len(merges) == len(trained_tokens()) - 256  # a pair for each token of several bytes


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="ab'sS 1\n\r\t你好é.", max_size=60))
def test_any_text_is_that_of_tiktoken(learnt: Three, pairs: Three, text: str) -> None:
    learnt.check(text)
    pairs.check(text)


def test_every_character_is_cut_as_in_tiktoken(pairs: Three) -> None:
    for character in some_characters():
        pairs.check(f"a{character}Bc 1{character}的{character}'s{character}\n{character} ")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_vocabulary_that_was_learnt_merges_as_in_tiktoken(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Grown from few letters, so that one token can be made in many ways."""
    tokens = [*BYTES]
    for _ in range(data.draw(st.integers(1, 25))):
        word = data.draw(st.text(alphabet="ab ", min_size=2, max_size=12))
        ids = oracle(tokens).encode(word)
        if len(ids) > 1:
            at = data.draw(st.integers(0, len(ids) - 2))
            token = tokens[ids[at]] + tokens[ids[at + 1]]
            tokens += [] if token in tokens else [token]
    three = Three(tmp_path_factory.mktemp("grown"), tokens)
    three.check(data.draw(st.text(alphabet="ab ", max_size=60)))


def test_a_token_that_was_put_in_is_found_where_it_is_a_word(tmp_path: Path) -> None:
    tokens = [*BYTES, b"abcd", b"ab", b"xyz", b"yz"]  # abcd has no halves; ab comes too late
    three = Three(tmp_path, tokens)
    for text in ("abcd", "abcd abcd", "xyz", "xxyz", "1abcd", "abcde"):
        three.check(text)


def test_special_tokens_have_their_ids_and_names(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_ranks(tmp_path, BYTES))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (256, (257,))
    assert tokenizer.vocab_size == 512
    assert tokenizer.token(258) == "<|im_end|>"
    assert tokenizer.token(260) == "<|reserved_token_260|>"
    assert set(range(256, 512)) - tokenizer.special_token_ids == {256 + 17}
    assert tokenizer.encode("a") == [97]  # as the model's class: nothing before it
    assert tokenizer.decode([256, 97, 273, 98, 258]) == "a<|im_middle|>b"


# ---- what is refused -----------------------------------------------------------------------

LINES = [f"{base64.b64encode(byte).decode()} {rank}" for rank, byte in enumerate(BYTES)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no token for the byte"),
        (LINES[:-1], "0xff"),
        ([*LINES, "YWI= 257"], "rank 257 in place 256"),
        ([*LINES, "YWI= 255"], "in place"),
        ([*LINES, "YQ== 256"], "once more"),
        ([*LINES, "YWI 256"], "line 257"),
        ([*LINES, "Y*WI= 256"], "line 257"),
        ([*LINES, "YWI="], "line 257"),
        ([*LINES, "YWI= 256 1"], "line 257"),
        ([*LINES, "YWI= -1"], "line 257"),
        ([*LINES, "YWI= 1e3"], "line 257"),
        ([*LINES, "YWI= ²"], "line 257"),
        ([*LINES, "YWI= " + "9" * 5000], "line 257"),
        ([*LINES, base64.b64encode(b"a" * 1025).decode() + " 256"], "line 257"),
        (["\0" * 100], "line 1"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, lines: list[str], message: str) -> None:
    write_ranks(tmp_path, BYTES)
    (tmp_path / "tiktoken.model").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TokenizerError, match=re.escape("tiktoken.model")) as caught:
        Tokenizer.open(tmp_path)
    assert message in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write_ranks(tmp_path, BYTES)
    with (tmp_path / "tiktoken.model").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.open(tmp_path)
    assert f"at most {MAX_BYTES}" in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8))
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    folder = write_ranks(tmp_path_factory.mktemp("damaged"), [*BYTES, b"ab", b"abc"])
    chance = random.Random(seed)
    file = folder / "tiktoken.model"
    data = bytearray(file.read_bytes())
    for _ in range(count):
        data[chance.randrange(len(data))] = chance.choice(b"\n\r =+/09AZaz\0\xff-")
    file.write_bytes(data)
    with contextlib.suppress(TokenizerError):
        Tokenizer.open(folder).encode("abc")


@pytest.mark.parametrize("name", [None, "QWenTokenizer", 7, [KIMI], {}])
def test_an_unknown_class_is_refused_with_a_way_out(tmp_path: Path, name: object) -> None:
    with pytest.raises(TokenizerError, match="words") as caught:
        Tokenizer.open(write_ranks(tmp_path, BYTES, tokenizer_class=name))
    assert list(PATTERNS) == [caught.value.allowed]
    assert "tokenizer.json" in str(caught.value.hint)


@pytest.mark.parametrize(
    "named",
    [
        {"255": {"content": "x"}},
        {"512": {"content": "x"}},
        {"0300": {"content": "x"}},
        {"300": {"content": "a"}},
        {"300": {"content": ""}},
        {"300": {"content": "x"}, "301": {"content": "x"}},
        {"300": {"content": "<|reserved_token_301|>"}},
        {"300": {"content": 7}},
        {"300": "x"},
        {"x": {"content": "x"}},
        [],
    ],
)
def test_special_tokens_that_do_not_fit_are_refused(tmp_path: Path, named: object) -> None:
    write_ranks(tmp_path, BYTES, added_tokens_decoder=named, bos_token=None, eos_token=None)
    with pytest.raises(TokenizerError, match="added_tokens_decoder"):
        Tokenizer.open(tmp_path)


def test_a_tokenizer_json_wins(tmp_path: Path, tiny_mla: Path) -> None:
    write_ranks(tmp_path, BYTES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_mla / name).read_bytes())
    expected = Tokenizer.open(tiny_mla).encode("The keeper")
    assert Tokenizer.open(tmp_path).encode("The keeper") == expected
