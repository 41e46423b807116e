"""What makes a repeated command the same, and how a difference reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import mla_deploy.job as job_module
from mla_deploy.job import difference, job_of, stamp


def model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "notes.md"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("some text")
    return file


def job(source: Path, text: Path, **options: Any) -> dict[str, Any]:
    return job_of("convert", [source], {"calibration": [text, "self"], **options}, [text])


def test_spelling_is_no_difference(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path / "model")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    found = job(source, text)
    assert job(Path("model"), Path("text.txt")) == found
    assert job(Path("link"), Path("model/../text.txt")) == found
    (source / "notes.md").write_text("read by nobody")
    assert job(source, text) == found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": 512}, "--window 512, not 256"),
        ({}, "--window default, not 256"),
        ({"window": 256, "no_calibration": True}, "--no-calibration on, not default"),
        ({"window": 256, "heal": ["a", "b"]}, "--heal a and b, not default"),
    ],
)
def test_options_that_differ_are_named(
    options: dict[str, Any], expected: str, tmp_path: Path, text: Path
) -> None:
    source = model(tmp_path / "model")
    assert difference(job(source, text, **options), job(source, text, window=256)) == expected


def test_files_that_differ_are_named(tmp_path: Path, text: Path) -> None:
    source = model(tmp_path / "model")
    before = job(source, text)
    (source / "config.json").write_text("edited")
    text.write_text("edited")
    assert difference(before, job(source, text)) == "config.json changed, text.txt changed"
    (source / "added_tokens.json").touch()
    (source / "tokenizer.json").unlink()
    assert difference(before, job(source, text)) == (
        "added_tokens.json, which is new, config.json changed, tokenizer.json, which is gone, "
        "text.txt changed"
    )


def test_another_model_version_or_command_is_named(tmp_path: Path, text: Path) -> None:
    first, second = model(tmp_path / "first"), model(tmp_path / "second")
    before = job(first, text)
    assert difference(before, job(second, text)) == f"the model {first}, not {second}"
    both, swapped = (job_of("eval", models, {}) for models in ([first, second], [second, first]))
    assert difference(both, swapped) == f"the model {first} and {second}, not {second} and {first}"
    other = {**before, "version": "0.0.1"}
    assert difference(other, before).startswith("mla-deploy 0.0.1, not ")
    assert difference(before, job_of("build", [first], {})) == "the work of `convert`"
    assert difference({"of": "another program"}, before) == "the work of another command"


def test_a_large_file_is_known_by_size_and_time(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = stamp([text])
    os.utime(text, (1, 1))
    assert stamp([text]) == small
    monkeypatch.setattr(job_module, "LARGE_FILE_BYTES", 4)
    assert stamp([text]) == {str(text): "9 bytes of 1000000000"}


def test_a_manifest_stands_for_its_bundle(tmp_path: Path) -> None:
    bundle = model(tmp_path / "bundle")
    (bundle / "manifest.json").write_text("digests")
    assert list(job_of("eval", [bundle], {})["files"]) == [str(bundle / "manifest.json")]
