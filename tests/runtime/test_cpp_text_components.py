"""Each component of tokenizer.json that C++ supports, alone and in every behaviour, against the
package tokenizers."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from cpp.core_abi import AbiError
from cpp.text_abi import CppTokenizer, load_text, some_characters
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence as SequenceProcessor
from tokenizers.processors import TemplateProcessing

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI_K2 = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

TEXTS = [
    "", " ", "a", "Hello  world's 12345 tests!!", " leading", "trailing ", "  \n\n x \t\r\n y", "a-b--c---d", "--",
    "-a-", "1a22b333", "½Ⅷ²", "中文 and 日本語のテスト ひらがな", "DON'T we'LL I'ſ it'S", "é e\u0301 \u0301\u0301x",
    "▁a▁▁b", "a ▁ b", "\x00\x01\u180e\u200b\u3000.", "👩‍👧 🇩🇪", "<x><y> <x>a<x>", "x<x", " <x> ", "aaaaaa" * 20,
    "HelloWorld HTTPServer iPhone", "-\n-\n", "snake_case $100,000.00", "\U00031350\U00010d4a\u0897",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    load_text()


def random_texts(count: int, seed: int = 7) -> list[str]:
    order = random.Random(seed)
    pieces = [*"ab -1\n'_.▁中é", "\u0301", "<x>", "  ", "Ab", "the", "\r\n", "ſ", "日", "ひ", "👍"]
    return ["".join(order.choices(pieces, k=order.randrange(30))) for _ in range(count)]


def byte_level_model() -> models.BPE:
    """Every byte, and all pairs of some."""
    alphabet = sorted(pre.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = []
    for pair in itertools.product("abelost-1Ġ'H", repeat=2):
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    for pair in [("th", "e"), ("Ġt", "he"), ("aa", "aa"), ("Ġ", "the"), ("ll", "o")]:
        if {*pair} <= vocab.keys():
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    return models.BPE(vocab, merges)


def character_model(**options: Any) -> models.BPE:
    """Some characters, and pairs of them; others are unknown."""
    characters = ["<unk>", *"abelost-1▁H中"]
    vocab = {char: i for i, char in enumerate(characters)}
    merges = []
    for pair in itertools.product("abel▁1", repeat=2):
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    if options.get("byte_fallback"):
        for byte in range(256):
            vocab[f"<0x{byte:02X}>"] = len(vocab)
    return models.BPE(vocab, merges, **options)


def assert_same(theirs: Tokenizer, texts: Sequence[str] = (), text_json: str = "") -> None:
    ours = CppTokenizer(text_json or theirs.to_str())
    for text in [*TEXTS, *random_texts(30), *texts]:
        ids = theirs.encode(text).ids
        assert ours.encode(text, special=True) == ids, text
        if ids:  # theirs panics where Strip has nothing to strip
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text
    order = random.Random(2)
    for skip in (False, True):
        for _ in range(20):
            ids = [order.randrange(ours.vocab_size + 2) for _ in range(order.randrange(1, 40))]
            wanted = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip) == wanted, ids
            pieces = [piece.decode() for piece in ours.stream(skip).pieces(ids)]
            assert "".join(pieces) == wanted, ids


def with_pre_tokenizer(step: Any) -> Tokenizer:
    """The step, then bytes, so that every difference in its parts shows in the ids."""
    tokenizer = Tokenizer(byte_level_model())
    last = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([step, last])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# ---- pre-tokenizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize(
    "behavior", ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]
)
@pytest.mark.parametrize("pattern", ["-", "a", " ", "ab", Regex("[-1]"), Regex("-*"), Regex(GPT4)])
def test_split(pattern: str | Regex, behavior: str, invert: bool) -> None:
    assert_same(with_pre_tokenizer(pre.Split(pattern, behavior, invert)))


@pytest.mark.parametrize("pattern", [GPT4, DEEPSEEK_V3, KIMI_K2], ids=["gpt4", "v3", "kimi"])
def test_patterns_of_real_models(pattern: str) -> None:
    theirs = with_pre_tokenizer(pre.Split(Regex(pattern), "isolated"))
    assert_same(theirs, ["".join(f"a{c} '{c}1{c} \n" for c in some_characters())])


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d+", r"\D", r"\s", r"\S+", r"\w+", r"\W", r"\h+", r"\H", r"[\h-]", r"[^\s-]+", r"[\S]", r"[\w']+", r"[^\w]",
        r"\p{^L}+", r"\P{L}", r"[\P{N}b]", r"\p{Lu}\p{Ll}*", r"\p{Han}+|\p{Hiragana}", r"a{2}", r"a{1,2}+", r"a{,2}b",
        r"a{2,}?", r"a{b", r"a++", r"a?+a", r"(?:ab)*-", r"(a|b)+", r"(?<=a)b", r"(?<!a)b", r"a(?=b)", r"(?>a|ab)b",
        r"(?i)hello|WORLD", r"(?i:H)e", r"(?m:a.b)", r".", r"^.", r".$", r"\A.", r".\z", r".\Z", r"[a[1-9]]+", r"[a-e&&[^b]]+",
        r"[^a-e&&[^b]]+", r"[^a[b]]", r"[-a]", r"[a-]", r"[\d-]+", r"[\-\]\\]", r"\u4e2d", r"\x{4e2d}|\x61", r"[\u4e00-\u9fff]+",
        r"[一-龥ࠀ-一가-퟿]+", r"\n|\r|\t|\v|\f", r"\.|\-|\$", r"(?:)", r"a||b", r"[ab]{0}", r"(?:a(?:b(?:c)?)?)?",
    ],
)  # fmt: skip
def test_regular_expressions_mean_the_same(pattern: str) -> None:
    assert_same(with_pre_tokenizer(pre.Split(Regex(pattern), "isolated")))


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bword", r"(a)\1", r"\Ga", r"\Ka", r"\Xa", r"\Ra", r"[[:alpha:]]", r"(?<n>a)\k<n>", r"a**", r"(?x: a )", r"a(?i)b",
        r"\p{Alphabetic}", r"\p{Ō}", r"[a", r"(a", r"a)", r"a]", r"[]", r"*a", r"^*", r"\xff", r"[b-a]", r"\p{L", "\\", r"(?#c)", r"a{2}?", r"[\d-a]", r"[\w-\d]",
        r"(?(1)a)", r"\Qa\E", "(" * 60 + ")" * 60, r"a{99999}", r"\cA", r"\C", r"(*FAIL)",
    ],
)  # fmt: skip
def test_other_regular_expressions_are_refused(pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    config = {"model": json.loads(byte_level_model().__getstate__()), "pre_tokenizer": split}
    with pytest.raises(AbiError) as caught:
        CppTokenizer(json.dumps(config))
    assert caught.value.status == "UNSUPPORTED"
    assert "pre_tokenizer.pattern.Regex" in caught.value.text


@pytest.mark.parametrize("individual", [False, True])
def test_digits(individual: bool) -> None:
    every = [f"{char}a" for char in some_characters()]
    assert_same(with_pre_tokenizer(pre.Digits(individual)), ["".join(every)])


@pytest.mark.parametrize("add_prefix_space", [False, True])
@pytest.mark.parametrize("use_regex", [False, True])
def test_byte_level(add_prefix_space: bool, use_regex: bool) -> None:
    tokenizer = Tokenizer(byte_level_model())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<x>"])
    tokenizer.post_processor = ByteLevelProcessor()
    assert_same(tokenizer)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace(scheme: str, split: bool) -> None:
    tokenizer = Tokenizer(character_model(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre.Metaspace("▁", scheme, split)
    tokenizer.decoder = decoders.Metaspace("▁", scheme, split)
    tokenizer.add_special_tokens(["<x>"])
    assert_same(tokenizer)
    steps = [pre.Split("-", "removed"), pre.Metaspace("_", scheme, split)]
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    assert_same(tokenizer)


def test_metaspace_of_old_files() -> None:
    tokenizer = Tokenizer(character_model(unk_token="<unk>"))
    config = json.loads(tokenizer.to_str())
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    text = json.dumps({**config, "pre_tokenizer": old, "decoder": old})
    assert_same(Tokenizer.from_str(text), text_json=text)
    config["decoder"] = {**old, "add_prefix_space": False}
    with pytest.raises(AbiError, match=r"decoder\.add_prefix_space"):
        CppTokenizer(json.dumps(config))


# ---- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("unk", [None, "<unk>"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_unknown_characters(
    byte_fallback: bool, unk: str | None, fuse: bool, ignore_merges: bool
) -> None:
    model = character_model(
        byte_fallback=byte_fallback, unk_token=unk, fuse_unk=fuse, ignore_merges=ignore_merges
    )
    tokenizer = Tokenizer(model)
    assert_same(tokenizer)
    tokenizer.pre_tokenizer = pre.Metaspace()
    assert_same(tokenizer)


def test_bytes_that_are_not_all_tokens() -> None:
    """Unknown characters are held back while bytes overtake them."""
    config = json.loads(Tokenizer(character_model(byte_fallback=True, unk_token="<unk>")).to_str())
    for name in ("<0xE4>", "<0x0A>"):
        del config["model"]["vocab"][name]
    text = json.dumps(config)
    assert_same(Tokenizer.from_str(text), ["é中z日é", "日日é\nb", "é日aé日"], text)


def test_ignore_merges_takes_whole_words() -> None:
    config = json.loads(with_pre_tokenizer(pre.Split(Regex(GPT4), "isolated")).to_str())
    vocab = config["model"]["vocab"]
    for word in ("Hello", "Ġworld", "ä¸Ńæĸĩ", "12"):  # no merges lead to them
        vocab[word] = len(vocab)
    for ignore in (False, True):
        config["model"]["ignore_merges"] = ignore
        assert_same(Tokenizer.from_str(json.dumps(config)), text_json=json.dumps(config))


def test_merges_in_both_forms() -> None:
    config = json.loads(with_pre_tokenizer(pre.Digits()).to_str())
    pairs = config["model"]["merges"]
    config["model"]["merges"] = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    text = json.dumps(config)
    assert_same(Tokenizer.from_str(text), text_json=text)


def test_merges_in_random_order() -> None:
    order = random.Random(11)
    for _ in range(8):
        vocab = {c: i for i, c in enumerate("ab▁c")}
        merges: list[tuple[str, str]] = []
        for _ in range(60):
            pair = (order.choice([*vocab]), order.choice([*vocab]))
            if len(pair[0] + pair[1]) > 9 or pair in merges:
                continue
            vocab.setdefault("".join(pair), len(vocab))
            merges.append(pair)
        order.shuffle(merges)
        texts = ["".join(order.choices("ab▁c", k=k)) for k in range(1, 160, 7)]
        assert_same(Tokenizer(models.BPE(vocab, merges)), texts)


def test_vocabularies_with_gaps() -> None:
    model = models.BPE({"a": 0, "b": 7, "ab": 30}, [("a", "b")])
    assert_same(Tokenizer(model), ["abba"])


# ---- normalizers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
        normalizers.Replace(Regex(r"\s+"), ""),
        normalizers.Replace(Regex("-*"), "1"),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        normalizers.Sequence([]),
        normalizers.NFC(),
    ],
    ids=repr,
)
def test_normalizers(normalizer: Any) -> None:
    tokenizer = Tokenizer(character_model(byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<x>"])
    assert_same(tokenizer)


def nfc_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(byte_level_model())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.ByteLevel(False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_nfc_of_characters_and_marks() -> None:
    for mark in "\u0301", "\u0323\u0301", "\u3099", "\u11a8":
        text = "".join(f"{char}{mark}" for char in some_characters())
        tokenizer = nfc_tokenizer()
        ours = CppTokenizer(tokenizer.to_str())
        assert ours.decode(ours.encode(text)) == tokenizer.normalizer.normalize_str(text)


def test_nfc_of_random_marks() -> None:
    order = random.Random(4)
    pool = "".join(map(chr, [*range(0x300, 0x34F), *range(0x1100, 0x1113), *range(0x1161, 0x1176)]))
    pool += "aeoAEOſK\u212b가각힣" + "".join(
        map(chr, [*range(0x11A8, 0x11C3), *range(0x591, 0x5C0)])
    )
    pool += "\u0f71\u0f72\u0f74\u0f80\u1025\u102e\u0915\u093c\U000110ba\U0001d15e\U0001d16d"
    texts = ["".join(order.choices(pool, k=order.randrange(12))) for _ in range(500)]
    assert_same(nfc_tokenizer(), texts)


# ---- added tokens ------------------------------------------------------------------------------

FLAGS = ["single_word", "lstrip", "rstrip", "normalized"]


@pytest.mark.parametrize("flags", [*itertools.product([False, True], repeat=4)], ids=str)
@pytest.mark.parametrize("special", [False, True])
def test_added_tokens(flags: tuple[bool, ...], special: bool) -> None:
    tokenizer = Tokenizer(character_model(byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace("e", "a")
    chosen = dict(zip(FLAGS, flags, strict=True))
    contents = ["<x>", "<x>a", "el", "中", "a", " b "]
    tokenizer.add_tokens([AddedToken(c, special=special, **chosen) for c in contents])
    tokenizer.add_special_tokens(["<y>"])
    order = random.Random(6)
    pieces = ["<x>", "a", "e", "l", " ", "\t", "中", "<y>", "_", "é", "\u3000", "b", "<x"]
    texts = ["".join(order.choices(pieces, k=order.randrange(14))) for _ in range(100)]
    assert_same(tokenizer, texts)


def test_single_words_end_where_any_word_character_is() -> None:
    tokenizer = Tokenizer(character_model(byte_fallback=True))
    tokenizer.add_tokens([AddedToken("<x>", single_word=True)])
    assert_same(tokenizer, ["".join(f"{char}<x> <x>{char} " for char in some_characters())])


# ---- around the model --------------------------------------------------------------------------


def template(single: str) -> TemplateProcessing:
    return TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])


@pytest.mark.parametrize(
    "processor",
    [
        template("<s> $A"),
        template("<s> $A </s> </s>"),
        template("$A </s>"),
        SequenceProcessor([ByteLevelProcessor(), template("<s> $A")]),
    ],
)
def test_templates(processor: Any) -> None:
    tokenizer = Tokenizer(character_model(byte_fallback=True))
    tokenizer.post_processor = processor
    assert_same(tokenizer)


REPLACE = decoders.Replace("▁", " ")
LLAMA = [REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.Sequence(LLAMA),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁a", "+")]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("aab", "<>"), decoders.Strip("b", 2, 2)]),
        decoders.Sequence([decoders.Fuse(), decoders.Metaspace("▁", "always")]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first")]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("\n", "N"), decoders.Strip("a", 1, 0)]),
        decoders.Sequence([decoders.Replace(Regex("[ab]"), "é"), decoders.Fuse()]),
        decoders.Strip("a", 1, 0),
        decoders.Metaspace("▁", "never"),
        decoders.Fuse(),
        decoders.ByteFallback(),
        decoders.ByteLevel(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 2)]),
    ],
    ids=repr,
)  # fmt: skip
def test_decoders(decoder: Any) -> None:
    tokenizer = Tokenizer(character_model(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<x>"])
    tokenizer.add_tokens(["+é+"])
    assert_same(tokenizer)


def test_bytes_are_read_as_rust_does() -> None:
    vocab = {t: i for i, t in enumerate(["<0x+5>", "<0x4a>", "<0xé>", "<0x4>", "<0x-5>", "<0xC3>", "<0xA9>", "<0x G>", "a"])}  # fmt: skip
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert_same(tokenizer)
