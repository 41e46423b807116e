"""What `eval` measures beside text, and caches that need a calibration, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Invoke = Callable[..., Result]
ValuesOf = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def calibrated(tiny_mla: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-mla with a cache format for each layer."""
    from mla_deploy.quant.options import QuantizeOptions
    from mla_deploy.quant.quantize import quantize_checkpoint

    out = tmp_path_factory.mktemp("calibrated") / "auto"
    options = QuantizeOptions(
        kv="auto", kv_budget=100.0, weights="none", calibration=(str(short_text),)
    )
    quantize_checkpoint(tiny_mla, out, options)
    return out


@pytest.fixture(scope="module")
def mixed_bundle(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mla_deploy.exporters.onnx import export_onnx

    return export_onnx(calibrated, tmp_path_factory.mktemp("mixed") / "bundle").bundle


def test_quantize_shows_what_each_layer_got(
    tiny_mla: Path, short_text: Path, tmp_path: Path, invoke: Invoke
) -> None:
    options = ("--kv", "int3", "--weights", "none", "--calibration", short_text)
    result = invoke("quantize", tiny_mla, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "int3" in line]
    assert [row[:3] for row in rows[-4:]] == [[str(layer), "int3", "92"] for layer in range(4)]


def test_formats_by_layer_reach_the_bundle(
    calibrated: Path, mixed_bundle: Path, values_of: ValuesOf
) -> None:
    layers = json.loads((calibrated / "config.json").read_text())["mla_deploy"]["layers"]
    formats = [layer["cache_format"] for layer in layers]
    assert len(set(formats)) > 1
    manifest = json.loads((mixed_bundle / "manifest.json").read_text())
    assert [layer["format"] for layer in manifest["cache"]["layers"]] == formats
    assert (mixed_bundle / "calibration.json").read_bytes() == (
        calibrated / "calibration.json"
    ).read_bytes()
    inspected = values_of("inspect", mixed_bundle)
    assert inspected["cache_format"] == "+".join(sorted(set(formats)))
    assert values_of("inspect", calibrated)["cache_format"] == inspected["cache_format"]


def test_a_bundle_with_formats_by_layer_computes_what_its_checkpoint_does(
    calibrated: Path, mixed_bundle: Path, short_text: Path, values_of: ValuesOf
) -> None:
    options = ("--text", short_text, "--window", 128, "--threads", 1)
    found = values_of("eval", mixed_bundle, "--reference", calibrated, *options)
    # A code at a rounding edge, and a router behind it, may fall either way.
    assert found["kl_median"] < 1e-4
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.02)


def test_stock_kernels_are_said_once(mixed_bundle: Path, short_text: Path, invoke: Invoke) -> None:
    for command in (
        ("run", mixed_bundle, "one", "-n", 1),
        ("eval", mixed_bundle, "--text", short_text, "-n", 8),
    ):
        result = invoke(*command)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("kernels: stock (") == 1
        asked = invoke(*command, "--kernels", "stock")
        assert "kernels: stock (" not in asked.stderr


def test_all_measures_resume_and_report(
    calibrated: Path, tiny_mla: Path, short_text: Path, tmp_path: Path, values_of: ValuesOf
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "Two and two?", "answer": "#### 4"}) + "\n")
    journal, report = tmp_path / "journal.jsonl", tmp_path / "report.html"
    options = (
        *("--reference", tiny_mla, "--text", short_text, "--window", 64, "--threads", 1),
        *("--key-value", 80, "--trials", 1, "--questions", questions, "--answer-tokens", 4),
        *("--resume", journal, "--report", report),
    )
    first = values_of("eval", calibrated, *options)
    assert len(first["retrieval"]) == 5
    assert first["questions"]["questions"] == 1
    assert [layer["format"] for layer in first["cache"]] == [
        layer["cache_format"]
        for layer in json.loads((calibrated / "config.json").read_text())["mla_deploy"]["layers"]
    ]
    lines = journal.read_text().count("\n")
    assert report.read_text().count("data:image/png") == 4
    assert values_of("eval", calibrated, *options) == first
    assert journal.read_text().count("\n") == lines


def test_nothing_asked_for(tiny_mla: Path, invoke: Invoke) -> None:
    result = invoke("eval", tiny_mla)
    assert result.exit_code == 2
    assert "--text, --passkey, --key-value" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv", "auto"), "under a budget"),
        (("--kv", "auto", "--kv-budget", 20, "--calibration", "TEXT"), "76 bytes or more"),
        (("--kv-budget", 90), "budget is for --kv auto"),
        (("--calibration", "MISSING"), "cannot be read"),
    ],
)
def test_calibrations_that_cannot_be(
    options: tuple[object, ...],
    message: str,
    tiny_mla: Path,
    short_text: Path,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    names = {"TEXT": short_text, "MISSING": tmp_path / "missing.txt"}
    given = [names.get(str(option), option) for option in options]
    result = invoke("quantize", tiny_mla, "-o", tmp_path / "out", *given)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
