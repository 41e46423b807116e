"""Bundles as untrusted input: manifests that lie, and files that are not what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_deploy import bundle as bundle_module
from mla_deploy.bundle import Bundle, describe_file
from mla_deploy.errors import BundleError

Json = dict[str, Any]


def write(folder: Path, manifest: object) -> Path:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose graph is a file of four bytes."""
    folder = tmp_path / "bundle"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"onnx")
    (folder / "deep" / "tokenizer.json").write_bytes(b"{}")
    return write(folder, valid_manifest(folder))


def valid_manifest(folder: Path) -> Json:
    return {
        "format": "mla-deploy-bundle",
        "version": 1,
        "producer": "tests",
        "model": {
            "model_type": "toy",
            "parameters": 1,
            "vocab_size": 10,
            "hidden_size": 1,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 1,
            "qk_rope_head_dim": 64,
            "v_head_dim": 1,
            "max_position_embeddings": 100,
            "bos_token_id": None,
            "eos_token_ids": [1],
        },
        "graph": {"path": "model.onnx", "backend": "onnx", "lowering": "x", "opset": 24},
        "cache": {
            "page_tokens": 64,
            "layers": [
                {
                    "format": "int4",
                    "parts": [
                        {"name": "codes", "dtype": "uint8", "page_shape": [4, 64, 16, 4]},
                        {"name": "scale", "dtype": "float16", "page_shape": [8, 64]},
                    ],
                }
                for _ in range(2)
            ],
        },
        "recipe": {"kv": "int4"},
        "files": [
            describe_file(folder, name).model_dump()
            for name in ("model.onnx", "deep/tokenizer.json")
        ],
    }


def changed(manifest: Json, path: str, value: object) -> Json:
    """The manifest with another value at `a.b.0`; `...` removes it."""
    copy: Json = json.loads(json.dumps(manifest))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    target: Any = copy
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return copy


def test_a_bundle_opens(folder: Path) -> None:
    bundle = Bundle.open(folder, verify=True)
    assert bundle.file("model.onnx") == folder / "model.onnx"
    assert bundle.has("deep/tokenizer.json")
    assert not bundle.has("manifest.json")
    assert bundle.kv_bytes_per_token == 2 * (256 + 16)
    with pytest.raises(BundleError, match="does not list other"):
        bundle.file("other")


OUTSIDE = [
    "../model.onnx",
    "deep/../../model.onnx",
    "/etc/passwd",
    "..",
    ".",
    "",
    "/",
    "deep\\..\\model.onnx",
    "C:\\model.onnx",
    "model.onnx\0",
    "model\n.onnx",
    "\ud800",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, path: str) -> None:
    (folder.parent / "model.onnx").write_bytes(b"onnx")
    for place in ("files.0.path", "graph.path"):
        write(folder, changed(valid_manifest(folder), place, path))
        with pytest.raises(BundleError) as caught:
            Bundle.open(folder)
        assert "manifest.json" in caught.value.what


@pytest.mark.parametrize("target", ["outside", "absolute", "folder", "loop", "nothing"])
def test_a_link_that_leaves_the_folder_is_refused(folder: Path, target: str) -> None:
    secret = folder.parent / "elsewhere" / "tokenizer.json"
    secret.parent.mkdir()
    secret.write_bytes(b"{}")
    link = folder / "deep" / "tokenizer.json"
    link.unlink()
    if target == "outside":
        link.symlink_to("../../elsewhere/tokenizer.json")
    elif target == "absolute":
        link.symlink_to(secret)
    elif target == "folder":
        (folder / "deep").rmdir()
        (folder / "deep").symlink_to(secret.parent)
    elif target == "loop":
        link.symlink_to(link)
    else:
        link.symlink_to(folder / "nothing")
    with pytest.raises(BundleError, match=r"link|missing"):
        Bundle.open(folder)


def test_a_link_inside_the_folder_is_allowed(folder: Path) -> None:
    (folder / "model.onnx").rename(folder / "deep" / "graph")
    (folder / "model.onnx").symlink_to("deep/graph")
    Bundle.open(folder)


def test_a_bundle_may_itself_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        Bundle.open(folder)
    (folder / "model.onnx").mkdir()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        Bundle.open(folder)
    (folder / "model.onnx").rmdir()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        Bundle.open(folder)


def test_a_file_of_another_size_is_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"onn")
    with pytest.raises(BundleError, match="size") as caught:
        Bundle.open(folder)
    assert (caught.value.found, caught.value.allowed) == ("3 bytes", "4 bytes")


def test_a_changed_file_is_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"oNnx")
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(folder)


def test_large_files_are_hashed_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "LARGE_FILE_BYTES", 3)
    (folder / "model.onnx").write_bytes(b"oNnx")
    Bundle.open(folder)
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(folder, verify=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "other"),
        ("format", ...),
        ("version", 2),
        ("version", "1"),
        ("version", ...),
        ("unknown", 1),
        ("files.0.mode", "x"),
        ("files.0.bytes", -1),
        ("files.0.bytes", 1e400),
        ("files.0.sha256", "0" * 63),
        ("files.0.sha256", "Z" * 64),
        ("files", []),
        ("files", None),
        ("graph.backend", "python"),
        ("graph.path", "deep"),
        ("model.vocab_size", 0),
        ("model.vocab_size", 1 << 40),
        ("model.max_position_embeddings", -1),
        ("model.num_hidden_layers", 3),
        ("model.kv_lora_rank", ...),
        ("cache.page_tokens", 32),
        ("cache.layers", []),
        ("cache.layers.0.parts", []),
        ("cache.layers.0.parts.0.dtype", "object"),
        ("cache.layers.0.parts.0.name", "../x"),
        ("cache.layers.0.parts.0.name", "scale"),
        ("cache.layers.0.parts.0.page_shape", []),
        ("cache.layers.0.parts.0.page_shape", [0, 64]),
        ("cache.layers.0.parts.0.page_shape", [-1, -64]),
        ("cache.layers.0.parts.0.page_shape", [64] * 5),
        ("cache.layers.0.parts.0.page_shape", [1 << 21, 1]),
        ("cache.layers.0.parts.0.page_shape", [1 << 20] * 4),
        ("cache.layers.0.parts.0.page_shape", [63]),
        ("cache.layers.0.parts.0.page_shape", [1 << 70]),
        ("cache.layers.0.parts.0.page_shape", [64.5]),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, path: str, value: object) -> None:
    write(folder, changed(valid_manifest(folder), path, value))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"\xff\xfe",
        b'{"format": "mla-deploy-bundle"',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"version": ' + b"1" * 10_000 + b"}",
        b" " * (17 << 20),
    ],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(folder)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.open(folder)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)


def test_another_version_says_who_wrote_it(folder: Path) -> None:
    write(folder, {**valid_manifest(folder), "version": 9, "producer": "mla-deploy 7.0"})
    with pytest.raises(BundleError, match="another version") as caught:
        Bundle.open(folder)
    assert (caught.value.found, caught.value.allowed) == ("9", "1")
    assert "mla-deploy 7.0" in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths_of(value: object, prefix: str = "") -> list[str]:
    """Every place in a JSON value."""
    items: list[tuple[str, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    found = []
    for key, item in items:
        found += [prefix + key, *paths_of(item, f"{prefix}{key}.")]
    return found


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_other_value_anywhere_opens_or_is_one_clear_error(
    folder: Path, data: st.DataObject
) -> None:
    manifest = valid_manifest(folder)
    path = data.draw(st.sampled_from(paths_of(manifest)))
    write(folder, changed(manifest, path, data.draw(VALUES | st.just(...))))
    opens_or_refuses(lambda: Bundle.open(folder))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_open_or_are_one_clear_error(folder: Path, data: st.DataObject) -> None:
    content = bytearray(json.dumps(valid_manifest(folder)).encode())
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=10))
    (folder / "manifest.json").write_bytes(content)
    opens_or_refuses(lambda: Bundle.open(folder))


def opens_or_refuses(call: Callable[[], Bundle]) -> None:
    try:
        bundle = call()
    except BundleError:
        return
    root = bundle.path.resolve()
    for entry in bundle.manifest.files:
        assert bundle.file(entry.path).resolve().is_relative_to(root)
