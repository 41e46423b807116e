"""What `eval` measures beside text, and caches that need a calibration, as a user meets them."""

from __future__ import annotations

import json
import re
import shutil
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


def test_bits_by_layer_go_all_the_way(
    tiny_mla: Path, short_text: Path, tmp_path: Path, invoke: Invoke, values_of: ValuesOf
) -> None:
    """Quantised, shown, exported, run by the engine to what the torch reference computes."""
    model, bundle, report = tmp_path / "model", tmp_path / "bundle", tmp_path / "report.html"
    options = ("--kv", "fp32", "--weights", "auto", "--weights-budget", 5.5)
    result = invoke("quantize", tiny_mla, "-o", model, *options, "--calibration", short_text)
    assert result.exit_code == 0, result.output
    layers = json.loads((model / "config.json").read_text())["mla_deploy"]["layers"]
    kinds = {"matrices": "linear", "routed experts": "experts"}
    shown = re.findall(r"^ +(\d) +(matrices|routed experts) +int(\d)", result.stdout, re.MULTILINE)
    assert len(shown) == 7
    for layer, name, bits in shown:
        assert layers[int(layer)][kinds[name]]["bits"] == int(bits)
    assert {bits for *_, bits in shown} == {"4", "8"}
    assert "of 5.5 bits a weight" in result.stdout

    values_of("export", model, "-o", bundle)
    assert (bundle / "weight_bits.json").is_file()
    measured = ("--text", short_text, "--window", 128, "--threads", 1, "--report", report)
    found = values_of("eval", bundle, "--reference", model, *measured)
    assert found["kl_median"] < 1e-3  # the engine rounds what enters a quantised matrix to 8 bit
    assert "Bits of the matrices" in report.read_text()
    assert len(values_of("run", bundle, "one", "-n", 4)["tokens"]) == 4


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


def test_figures_of_what_has_changed_are_not_taken_over(
    tiny_mla: Path, bundle: Path, mixed_bundle: Path, short_text: Path, tmp_path: Path,
    invoke: Invoke,
) -> None:  # fmt: skip
    """Another model under the same name, and an edited text, each with old figures."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(bundle, model)
    shutil.copy(short_text, text)
    command = (
        *("eval", model, "--reference", tiny_mla, "--text", text, "-n", 16),
        *("--threads", 1, "--resume", tmp_path / "journal.jsonl"),
    )
    assert invoke(*command).exit_code == 0
    assert invoke(*command).exit_code == 0

    def refused() -> str:
        result = invoke(*command)
        assert result.exit_code == 2, result.output
        assert "belongs to another evaluation" in result.stderr
        return result.stderr

    text.write_text(text.read_text() + " More.")
    assert "text.txt changed" in refused()
    shutil.copy(short_text, text)
    shutil.rmtree(model)
    shutil.copytree(mixed_bundle, model)
    assert "manifest.json changed" in refused()
    assert "--window default, not 64" in invoke(*command, "--window", 64).stderr


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
        (
            ("--kv", "auto", "--kv-first", "int8", "--kv-budget", 90, "--calibration", "TEXT"),
            "--kv auto --kv-first int8",
        ),
        (("--weights", "auto", "--weights-budget", 5), "under a budget"),
        (
            ("--weights", "none", "--zeros", "exact", "--group", 128),
            "--weights none --group 128 --zeros exact",
        ),
        (
            ("--weights", "auto", "--weights-budget", 3, "--calibration", "TEXT"),
            "4.525 bits or more",
        ),
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
