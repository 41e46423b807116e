"""Calibration: exact before rounding, better after it, and clear about bad texts and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import relative_error

from mla_deploy.cache import cache_record
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import UsageError
from mla_deploy.families import load_config
from mla_deploy.model import forward_window, load_model
from mla_deploy.quant import quantize as quantize_module
from mla_deploy.quant.calibrate import calibrate
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.quant.window_run import WindowRun, rotated
from mla_deploy.recipe import CALIBRATION_FILE


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    return forward_window(load_model(path), Checkpoint(path).config, ids.unsqueeze(0))[0]


def options(text: Path, **changes: Any) -> QuantizeOptions:
    settings = {"kv": "fp32", "weights": "none", "calibration": (str(text),), **changes}
    return QuantizeOptions(**settings)


def test_a_calibrated_fold_changes_nothing_before_rounding(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(tiny_mla, tmp_path / "out", options(short_text, rotate=True))
    recipe = Checkpoint(tmp_path / "out").config.recipe
    folds = [recipe.of_layer(layer) for layer in range(4)]
    assert any(fold.balanced for fold in folds)
    assert all(fold.latent_rotation == 64 for fold in folds)
    ids = torch.randint(0, 4096, (100,))
    assert relative_error(logits(tmp_path / "out", ids), logits(tiny_mla, ids)) < 1e-4


def test_what_is_measured_is_what_folding_gives(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    """The rotation in place, and the KL divergence of the checkpoint that was written."""
    report = quantize_checkpoint(tiny_mla, tmp_path / "out", options(short_text, kv="int3"))
    assert report.cache is not None
    config = load_config(tiny_mla)
    text = CalibrationText.read([short_text], tiny_mla, config)
    ids = torch.tensor(text.windows[0])
    run = WindowRun(load_model(tiny_mla), config, text.windows[0])
    state: Any = run.start
    with torch.no_grad():
        for layer, rotation in enumerate(report.cache.rotations):
            with rotated(run.attention(layer), rotation):
                state = run.layer(layer, *state, "int3")
        found = run.log_probabilities(*state)
    expected = logits(tmp_path / "out", ids).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    assert float(kl.median()) < 1e-3  # int3 itself is an order of magnitude away


@torch.no_grad()
def test_the_measured_errors_are_those_of_the_record(tiny_mla: Path, short_text: Path) -> None:
    config = load_config(tiny_mla)
    text = CalibrationText.read([short_text], tiny_mla, config)
    measured, _ = calibrate(load_model(tiny_mla), config, text, [("int4",)] * 4, measures_kl=False)
    run = WindowRun(load_model(tiny_mla), config, text.windows[0])
    noise = energy = 0.0
    for ids in text.windows:
        run = WindowRun(load_model(tiny_mla), config, ids)
        c_kv, k_pe = run.latents(0, run.normed(0, *run.start))
        record = cache_record("int4")
        stored = [part.unsqueeze(0) for part in record.encode(c_kv, k_pe)]
        noise += float((record.decode(stored, torch.float32)[0][0] - c_kv).square().sum())
        energy += float(c_kv.square().sum())
    expected = 10 * torch.tensor(energy / noise).log10()
    assert measured.layers[0][0].sqnr_db["none"] == pytest.approx(float(expected), rel=1e-3)
    # The trained model has outlier channels: a rotation gains decibels in the first layer.
    choice = measured.layers[0][0]
    assert choice.sqnr_db["hadamard"] > choice.sqnr_db["none"] + 3
    assert choice.rotation != "none"
    assert choice.output_error[choice.rotation] == min(choice.output_error.values())
    assert choice.kl is None


@pytest.fixture(scope="module")
def allocated(
    tiny_mla: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, quantize_module.QuantizeReport]:
    out = tmp_path_factory.mktemp("auto") / "out"
    chosen = options(short_text, kv="auto", kv_budget=101.0)
    return out, quantize_checkpoint(tiny_mla, out, chosen)


def test_auto_keeps_to_the_budget_and_beats_what_fits_uniformly(
    allocated: tuple[Path, quantize_module.QuantizeReport],
) -> None:
    out, report = allocated
    cache = report.cache
    assert cache is not None
    assert cache.bytes_per_layer <= 101
    recipe = Checkpoint(out).config.recipe
    formats = recipe.cache_formats(4)
    assert formats == tuple(choice.format for choice in cache.chosen)
    sizes = [cache_record(name).bytes_per_token(128, 32) for name in formats]
    assert sum(sizes) / 4 == cache.bytes_per_layer
    measured = {point.name: point for point in cache.points if point.is_measured}
    best = min(point.kl for point in measured.values() if point.size <= 101)
    taken = [p for p in measured.values() if p.size == cache.bytes_per_layer]
    assert min(point.kl for point in taken) == best
    # 101 bytes is between int3 and int4.
    assert measured["int4"].size > 101 > measured["int3"].size
    assert best <= measured["int3"].kl


def test_auto_writes_down_what_it_measured(
    allocated: tuple[Path, quantize_module.QuantizeReport],
) -> None:
    out, report = allocated
    raw = json.loads((out / CALIBRATION_FILE).read_text())
    assert report.cache is not None
    assert raw["budget"] == 101
    assert raw["chosen"] == json.loads(json.dumps(report.to_json()))["calibration"]["chosen"]
    names = {file.name for file in out.iterdir()}
    assert not any("axes" in name or "partial" in name for name in names)


def test_a_killed_run_folds_the_same_matrices_again(
    tiny_mla: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(short_text, kv="int4")
    quantize_checkpoint(tiny_mla, tmp_path / "whole", chosen)

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(quantize_module._Run, "weights", die)
        with pytest.raises(Killed):
            quantize_checkpoint(tiny_mla, tmp_path / "out", chosen)
    assert (tmp_path / "out.partial" / CALIBRATION_FILE).exists()
    monkeypatch.setattr(quantize_module, "choose_cache", die)  # must not be needed
    quantize_checkpoint(tiny_mla, tmp_path / "out", chosen)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"too short a text", "calibration text .* is too short"),
        ("caf\u00e9 ".encode("latin-1") * 100, "not UTF-8"),
    ],
    ids=["empty", "blank", "tiny", "latin-1"],
)
def test_texts_that_are_no_use(
    content: bytes, message: str, tiny_mla: Path, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        quantize_checkpoint(tiny_mla, tmp_path / "out", options(file, kv="int4"))
    assert str(file) in str(error.value)
    assert {one.name for one in tmp_path.iterdir()} == {"text.txt"}


def test_a_missing_text(tiny_mla: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        quantize_checkpoint(tiny_mla, tmp_path / "out", options(tmp_path / "no.txt", kv="int4"))


def test_a_budget_below_the_minimum_says_the_minimum(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    chosen = options(short_text, kv="auto", kv_budget=50.0)
    with pytest.raises(UsageError, match="budget is below") as error:
        quantize_checkpoint(tiny_mla, tmp_path / "out", chosen)
    minimum = cache_record("int2").bytes_per_token(128, 32)
    assert error.value.allowed is not None
    assert error.value.allowed.startswith(f"{minimum} bytes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": "auto"}, "under a budget"),
        ({"kv": "auto", "kv_budget": 100.0}, "under a budget"),
        ({"kv": "int4", "kv_budget": 100.0}, "budget is for --kv auto"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeOptions(**changes)
