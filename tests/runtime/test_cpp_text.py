"""The functions of mla_deploy/text.h: errors, handles, buffers, threads."""

from __future__ import annotations

import ctypes
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cpp.core_abi import STATUS, AbiError
from cpp.text_abi import CppTokenizer, call, load_text


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    load_text()


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest) -> CppTokenizer:
    return CppTokenizer(request.getfixturevalue("tiny_mla") / "tokenizer.json")


def small(**fields: Any) -> dict[str, Any]:
    """A tokenizer of three tokens."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    return {"added_tokens": [], "model": model, **fields}


def open_error(source: Any) -> AbiError:
    with pytest.raises(AbiError) as caught:
        CppTokenizer(source if isinstance(source, bytes | Path) else json.dumps(source))
    return caught.value


# ---- what a caller may do wrong ----------------------------------------------------------------


def test_tokens_are_found_by_content(tokenizer: CppTokenizer) -> None:
    assert tokenizer.token_id("<|bos|>") == 0
    assert tokenizer.vocab_size == 4096
    with pytest.raises(AbiError, match="no such token") as caught:
        tokenizer.token_id("<|nothing|>")
    assert caught.value.status == "NOT_FOUND"


def test_a_closed_handle_is_an_error_and_not_a_crash(tiny_mla: Path) -> None:
    own = CppTokenizer(tiny_mla / "tokenizer.json")
    handle = own.handle
    stream = own.stream()
    own.close()
    own.handle = handle
    for use in (own.close, lambda: own.encode("a"), own.stream, lambda: own.vocab_size):
        with pytest.raises(AbiError, match="closed") as caught:
            use()
        assert caught.value.status == "INVALID_HANDLE"
    own.handle = ctypes.c_void_p()
    with pytest.raises(AbiError, match="null"):
        own.encode("a")
    assert stream.push(65) + stream.flush()  # it keeps what it needs
    own.handle = stream.handle  # of another kind
    with pytest.raises(AbiError, match="another kind"):
        own.encode("a")
    own.handle = ctypes.c_void_p()
    stream.destroy()
    with pytest.raises(AbiError, match="null"):
        stream.push(1)


def test_null_pointers_are_errors(tokenizer: CppTokenizer) -> None:
    for name, arguments in {
        "mla_tokenizer_open": (None, None),
        "mla_tokenizer_open_bytes": (None, 5, None),
        "mla_tokenizer_vocab_size": (tokenizer.handle, None),
        "mla_tokenizer_token_id": (tokenizer.handle, None, 3, None),
        "mla_tokenizer_encode": (tokenizer.handle, None, 3, 0, None, 0, None),
        "mla_tokenizer_decode": (tokenizer.handle, None, 3, 0, None, 0, None),
        "mla_text_stream_create": (tokenizer.handle, 0, None),
    }.items():
        with pytest.raises(AbiError, match="is null") as caught:
            call(name, *arguments)
        assert caught.value.status == "INVALID_ARGUMENT", name


def test_a_small_buffer_says_what_is_needed(tokenizer: CppTokenizer) -> None:
    text = b"half a sentence, and then some"
    wanted = tokenizer.encode_bytes(text)
    count = ctypes.c_size_t()
    ids = (ctypes.c_int32 * 2)(-7, -7)
    status = load_text().mla_tokenizer_encode(
        tokenizer.handle, text, len(text), 0, ids, 2, ctypes.byref(count)
    )
    assert (status, count.value, list(ids)) == (
        STATUS.index("BUFFER_TOO_SMALL"),
        len(wanted),
        [-7, -7],
    )
    assert b"at least" in load_text().mla_last_error()
    out = ctypes.create_string_buffer(b"xyz", 3)
    array = (ctypes.c_int32 * len(wanted))(*wanted)
    status = load_text().mla_tokenizer_decode(
        tokenizer.handle, array, len(wanted), 0, out, 3, ctypes.byref(count)
    )
    assert (status, count.value, out.raw) == (STATUS.index("BUFFER_TOO_SMALL"), len(text), b"xyz")


@pytest.mark.parametrize(
    "text",
    [b"a\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"abc\xe4\xb8", b"\x80"],
)
def test_text_that_is_not_utf8_is_refused(tokenizer: CppTokenizer, text: bytes) -> None:
    with pytest.raises(AbiError, match="not UTF-8") as caught:
        tokenizer.encode_bytes(text)
    assert caught.value.status == "INVALID_ARGUMENT"
    assert f"at offset {len(text) - len(text.lstrip(b'abc'))}" in caught.value.text


def test_ids_of_no_token_have_no_text(tokenizer: CppTokenizer) -> None:
    ids = tokenizer.encode("one two")
    assert tokenizer.decode([-1, *ids, 4096, 2**31 - 1, -(2**31)]) == "one two"


def test_nothing_in_gives_nothing_out(tokenizer: CppTokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert list(tokenizer.stream().pieces([])) == [b""]


def test_text_may_hold_zeros(tokenizer: CppTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\0b\0")) == "a\0b\0"


def test_a_stream_is_as_new_after_flush(tokenizer: CppTokenizer) -> None:
    stream = tokenizer.stream()
    half = tokenizer.encode("é")[:1]
    assert tokenizer.encode("é") != half, "a token of its own: the test would be blind"
    assert stream.push(half[0]) == b""
    assert stream.flush() == "\ufffd".encode()
    assert b"".join(stream.pieces(tokenizer.encode("né"))) == "né".encode()


def test_threads_share_a_tokenizer(tokenizer: CppTokenizer) -> None:
    texts = [f"{i} words and {i * 7919} numbers é中 " * 50 for i in range(8)]
    wanted = [tokenizer.encode(text) for text in texts]
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(40):
            i = order.randrange(len(texts))
            if tokenizer.encode(texts[i]) != wanted[i] or tokenizer.decode(wanted[i]) != texts[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what a file may do wrong ------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert open_error(tmp_path / "none.json").status == "FILE_ERROR"
    assert open_error(tmp_path).status == "FILE_ERROR"  # a folder


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {},
}
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no model": (lambda c: c.pop("model"), '"model"'),
    "model of another kind": (lambda c: c["model"].update(type="Unigram"), "Unigram"),
    "vocab as list": (lambda c: c["model"].update(vocab=[1]), "model.vocab"),
    "negative id": (lambda c: c["model"]["vocab"].update(a=-1), r'model.vocab\["a"\]'),
    "huge id": (lambda c: c["model"]["vocab"].update(a=2**31), "4194303"),
    "fractional id": (lambda c: c["model"]["vocab"].update(a=0.5), "integer"),
    "one id twice": (lambda c: c["model"]["vocab"].update(c=0), "have the id 0"),
    "merge of no token": (lambda c: c["model"]["merges"].append(["a", "x"]), r"merges\[1\]"),
    "merge into no token": (lambda c: c["model"]["merges"].append(["b", "a"]), '"ba"'),
    "merge of three": (lambda c: c["model"]["merges"].append(["a", "b", "a"]), "left"),
    "merge with two spaces": (lambda c: c["model"]["merges"].append("a b a"), "one space"),
    "merge of a number": (lambda c: c["model"]["merges"].append(3), "left"),
    "flag as text": (lambda c: c["model"].update(byte_fallback="yes"), "true or false"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "model.dropout"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "truncation": (lambda c: c.update(truncation={"max_length": 4}), "truncation"),
    "padding": (lambda c: c.update(padding={"strategy": {"Fixed": 4}}), "padding"),
    "normalizer": (lambda c: c.update(normalizer={"type": "Lowercase"}), "Lowercase.*\n.*NFC"),
    "normalizer without type": (lambda c: c.update(normalizer={}), '"type"'),
    "pre-tokenizer": (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "decoder": (lambda c: c.update(decoder={"type": "WordPiece"}), "WordPiece.*\n.*Fuse"),
    "post-processor": (lambda c: c.update(post_processor={"type": "BertProcessing"}), "Bert"),
    "added token without id": (lambda c: c.update(added_tokens=[{"content": "x"}]), '"id"'),
    "added token elsewhere": (
        lambda c: c.update(added_tokens=[{"content": "x", "id": 7}]),
        "7 for.*\n.*3, which tokenizers",
    ),
    "added token twice": (
        lambda c: c.update(added_tokens=[{"content": "a", "id": 0}, {"content": "a", "id": 0}]),
        "twice",
    ),
    "added token of 5000 bytes": (
        lambda c: c.update(added_tokens=[{"content": "x" * 5000, "id": 3}]),
        "4096",
    ),
    "regex": (
        lambda c: c.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}
        ),
        r"pre_tokenizer.pattern.Regex",
    ),
    "behaviour": (
        lambda c: c.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Mixed"}
        ),
        "MergedWithNext",
    ),
    "template of two texts": (
        lambda c: c.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            }
        ),
        "the sequence A",
    ),
    "two templates": (
        lambda c: c.update(post_processor={"type": "Sequence", "processors": [TEMPLATE, TEMPLATE]}),
        "a second template",
    ),
    "ByteLevel not last": (
        lambda c: c.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits"}],
            }
        ),
        "ByteLevel last",
    ),
    "ByteFallback behind Fuse": (
        lambda c: c.update(
            decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}
        ),
        "ByteFallback",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_file_is_refused_by_name(name: str) -> None:
    change, said = BROKEN[name]
    config = small()
    change(config)
    error = open_error(config)
    assert error.status in {"BAD_TOKENIZER", "UNSUPPORTED"}
    with pytest.raises(AbiError, match=f"(?s){said}"):
        CppTokenizer(json.dumps(config))


@pytest.mark.parametrize("kind", ["normalizer", "pre_tokenizer", "decoder", "post_processor"])
def test_deep_nesting_is_refused(kind: str) -> None:
    field = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.get(kind, "decoders")
    if kind == "post_processor":
        field = "processors"
    nested: dict[str, Any] = {"type": "Sequence", field: []}
    for _ in range(100):
        nested = {"type": "Sequence", field: [nested]}
    assert open_error(small(**{kind: nested})).status == "UNSUPPORTED"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'"\\ud800"'],
    ids=range(8),
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    assert open_error(data).status in {"BAD_TOKENIZER", "UNSUPPORTED"}


def test_a_character_without_token_needs_the_unknown_token() -> None:
    config = small()
    config["model"]["unk_token"] = "<unk>"
    own = CppTokenizer(json.dumps(config))
    assert own.encode("aba") == [2, 0]
    with pytest.raises(AbiError, match="<unk>") as caught:
        own.encode("abc")
    assert caught.value.status == "BAD_TOKENIZER"
    assert own.encode("aba") == [2, 0]


def test_a_pattern_that_explodes_is_an_error() -> None:
    config = small(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(a|a|aa)*[cd]"},
            "behavior": "Isolated",
        }
    )
    own = CppTokenizer(json.dumps(config))
    with pytest.raises(AbiError, match="cannot be matched") as caught:
        own.encode("a" * 5000)
    assert caught.value.status == "TOO_COMPLEX"
    assert own.encode("ab") == [2]
