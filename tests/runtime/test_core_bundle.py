"""Bundles as the C++ engine reads them: every damage is found, and said."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cpp.core_abi import AbiError, Api, error_of, load_api, status_of


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api()


PART = ("cache", "layers", 0, "parts", 0)

# Where, what to put there, and what the error says.
EDITS: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "another version": (("version",), 2, "another version"),
    "a version that is no integer": (("version",), "1", "another version"),
    "another format": (("format",), "zip", "not the manifest of a bundle"),
    "an unknown field": (("more",), 1, "not valid at more"),
    "an unknown field below": (("model", "more"), 1, "not valid at model.more"),
    "a boolean for an integer": (("model", "hidden_size"), True, "at model.hidden_size"),
    "a float for an integer": (("model", "hidden_size"), 1.0, "at model.hidden_size"),
    "a text for an integer": (("model", "hidden_size"), "1", "at model.hidden_size"),
    "a huge integer": (("model", "hidden_size"), 2**70, "at model.hidden_size"),
    "a negative integer": (("model", "vocab_size"), -263, "at model.vocab_size"),
    "a vocabulary beyond the limit": (("model", "vocab_size"), 2**24 + 1, "at model.vocab_size"),
    "another vocabulary": (("model", "vocab_size"), 262, "the manifest's output logits"),
    "a negative end token": (("model", "eos_token_ids"), [-1], "at model.eos_token_ids"),
    "more layers than caches": (("model", "num_hidden_layers"), 3, "at cache.layers"),
    "no layers": (("cache", "layers"), [], "at cache.layers"),
    "pages of another size": (("cache", "page_tokens"), 32, "at cache.page_tokens"),
    "a page of part tokens": ((*PART, "page_shape"), [3], "parts.0.page_shape"),
    "a page beyond the limit": ((*PART, "page_shape"), [2**20] * 4, "parts.0.page_shape"),
    "a page without extent": ((*PART, "page_shape"), [64, 0], "parts.0.page_shape"),
    "five axes": ((*PART, "page_shape"), [64, 1, 1, 1, 1], "parts.0.page_shape"),
    "an unknown type": ((*PART, "dtype"), "float64", "parts.0.dtype"),
    "another type": ((*PART, "dtype"), "uint8", "the manifest's input cache.0.token"),
    "another shape": ((*PART, "page_shape"), [64, 2], "the manifest's input cache.0.token"),
    "a name that is a path": ((*PART, "name"), "a/b", "parts.0.name"),
    "a part that the graph lacks": ((*PART, "name"), "more", "lacks the input cache.0.more"),
    "a graph that is not listed": (("graph", "path"), "other.onnx", "does not list other.onnx"),
    "another backend": (("graph", "backend"), "tensorrt", "at graph.backend"),
    "a file above the folder": (("files", 0, "path"), "../toy", "at files.0.path"),
    "a hidden way up": (("files", 0, "path"), "a/../../b", "at files.0.path"),
    "a way up at the end": (("files", 0, "path"), "a/..", "at files.0.path"),
    "an absolute path": (("files", 0, "path"), "/etc/passwd", "at files.0.path"),
    "a path of another system": (("files", 0, "path"), "a\\b", "at files.0.path"),
    "a path without a name": (("files", 0, "path"), ".", "at files.0.path"),
    "an empty path": (("files", 0, "path"), "", "at files.0.path"),
    "a control character": (("files", 0, "path"), "a\nb", "at files.0.path"),
    "a file that is not there": (("files", 1, "path"), "other", "is missing"),
    "a wrong size": (("files", 0, "bytes"), 1, "not of the size"),
    "a negative size": (("files", 0, "bytes"), -1, "at files.0.bytes"),
    "a wrong digest": (("files", 0, "sha256"), "0" * 64, "is damaged"),
    "a digest that is none": (("files", 0, "sha256"), "x" * 64, "at files.0.sha256"),
    "a recipe that is no object": (("recipe",), [], "at recipe"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_is_wrong_says_where(api: Api, own_toy: Any, name: str) -> None:
    where, value, expected = EDITS[name]
    raw = place = json.loads((own_toy.path / "manifest.json").read_text())
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    (own_toy.path / "manifest.json").write_text(json.dumps(raw))
    error = error_of(api.engine, own_toy.path)
    assert error.status == "BAD_BUNDLE"
    assert expected in error.text


def fields_of(value: Any, where: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = [] if isinstance(value, list) else [(*where, key) for key, _ in inner]
    for key, one in value.items() if isinstance(value, dict) else inner:
        found += fields_of(one, (*where, key))
    return found


def test_no_field_may_be_missing_or_null(api: Api, own_toy: Any) -> None:
    path = own_toy.path / "manifest.json"
    whole = path.read_text()
    fields = [
        where for where in fields_of(json.loads(whole)) if where[0] != "recipe" or len(where) == 1
    ]
    assert len(fields) > 40
    for where in fields:
        for null in (False, True):
            raw = place = json.loads(whole)
            for step in where[:-1]:
                place = place[step]
            if null:
                place[where[-1]] = None
            else:
                del place[where[-1]]
            path.write_text(json.dumps(raw))
            if null and where[-1] in ("q_lora_rank", "bos_token_id"):
                api.engine(own_toy.path).close()
            else:
                assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE", (where, null)


def test_two_parts_of_one_name_are_refused(api: Api, own_toy: Any) -> None:
    path = own_toy.path / "manifest.json"
    raw = json.loads(path.read_text())
    raw["cache"]["layers"][0]["parts"] *= 2
    path.write_text(json.dumps(raw))
    assert "different names" in error_of(api.engine, own_toy.path).text


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b'{"format": "mla-deploy-bundle"}', b"\xff\xfe", b"[" * 100_000,
     b'{"a":' * 50_000, b'{"format": "mla-deploy-bundle", "version": 1e999}'],
)  # fmt: skip
def test_a_manifest_that_is_no_json_is_refused(api: Api, own_toy: Any, text: bytes) -> None:
    (own_toy.path / "manifest.json").write_bytes(text)
    assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE"


def test_every_truncation_of_a_manifest_is_refused(api: Api, own_toy: Any) -> None:
    whole = (own_toy.path / "manifest.json").read_bytes().rstrip()
    for size in range(0, len(whole), 13):
        (own_toy.path / "manifest.json").write_bytes(whole[:size])
        assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE"


def test_damaged_and_missing_files_are_found(api: Api, own_toy: Any) -> None:
    graph = own_toy.path / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1])
    assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE"
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE"
    graph.unlink()
    assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE"
    outside = own_toy.path.parent / f"{own_toy.path.name}-graph.onnx"
    outside.write_bytes(whole)
    graph.symlink_to(outside)
    assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE"
    graph.unlink()
    outside.unlink()
    graph.write_bytes(b"no graph")
    own_toy.seal()
    assert status_of(api.engine, own_toy.path) == "BAD_GRAPH"
    graph.write_bytes(whole)
    own_toy.seal()
    api.engine(own_toy.path).close()


def test_the_sha256_is_that_of_hashlib_for_every_length(api: Api, own_toy: Any) -> None:
    """A block has 64 bytes; a million letters are a vector of FIPS 180."""
    random = np.random.default_rng(6)
    for size in (*range(1, 200), 1 << 20, (1 << 20) + 1):
        (own_toy.path / f"file{size}").write_bytes(random.bytes(size))
    (own_toy.path / "empty").touch()
    (own_toy.path / "letters").write_bytes(b"a" * 1_000_000)
    own_toy.seal()
    assert "cdc76e5c9914fb9281a1c7e284d73e67" in (own_toy.path / "manifest.json").read_text()
    api.engine(own_toy.path).close()
    (own_toy.path / "letters").write_bytes(b"a" * 999_999 + b"b")
    assert status_of(api.engine, own_toy.path) == "BAD_BUNDLE"


def test_large_files_are_hashed_only_when_asked_for(api: Api, own_toy: Any) -> None:
    large = own_toy.path / "large"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    own_toy.seal()
    api.engine(own_toy.path, verify=1).close()
    with large.open("r+b") as file:
        file.write(b"x")
    api.engine(own_toy.path).close()
    assert status_of(api.engine, own_toy.path, verify=1) == "BAD_BUNDLE"


def test_no_damage_of_a_manifest_does_harm(api: Api, own_toy: Any) -> None:
    """Bytes flipped, dropped, doubled and exchanged at random: it opens, or it says why not."""
    path = own_toy.path / "manifest.json"
    whole = path.read_bytes()
    random = np.random.default_rng(7)
    refused = 0
    for _ in range(400):
        text = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            at, end = sorted(random.integers(0, len(text), 2).tolist())
            kind = random.integers(4)
            if kind == 0:
                text[at] ^= 1 << int(random.integers(8))
            elif kind == 1:
                del text[at : min(end, at + 40)]
            elif kind == 2:
                text[at:at] = text[at : min(end, at + 40)]
            else:
                text[at] = int(random.choice(list(b'0123456789-.eE"{}[]:,tfn\\')))
        path.write_bytes(text)
        try:
            api.engine(own_toy.path).close()
        except AbiError as error:
            assert error.status in ("BAD_BUNDLE", "OUT_OF_MEMORY")  # noqa: PT017
            refused += 1
    assert refused > 300
