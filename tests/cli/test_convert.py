"""`mla-deploy convert` from the command line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from support.models import save_checkpoint
from support.sources import byte_tokenizer, random_source, random_text

from mla_deploy.cache import cache_record

Run = Callable[..., Result]


@pytest.fixture
def run(invoke: Run) -> Run:
    return functools.partial(invoke, "convert")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = save_checkpoint(random_source("llama"), tmp_path / "source", None)
    byte_tokenizer(folder)
    return folder


def test_it_converts_and_reports(run: Run, source: Path, tmp_path: Path) -> None:
    text = random_text(tmp_path)
    size = ("--like-paper", "d_kv=64", "--calibration", text, "--tokens", 2048, "--window", 64)
    found = run(source, "-o", tmp_path / "out", *size, "--json")
    assert found.exit_code == 0
    values = json.loads(found.stdout)
    assert values["kv_lora_rank"] + values["qk_rope_head_dim"] == 40
    assert values["held_out"]["converted_loss"] > 0
    assert "pip install matplotlib" not in (tmp_path / "out" / "report.html").read_text()
    again = run(source, "-o", tmp_path / "out", *size)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    shown = run(source, "-o", tmp_path / "out", *size, "--force")
    assert shown.exit_code == 0
    assert "positions lost" in shown.stdout
    assert "top-1 agreement" in shown.stdout


def test_a_dry_run_shows_sizes_and_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    size = ("--target-ratio", 0.5, "--calibration", "self", "--dry-run")
    found = run(source, "-o", tmp_path / "out", *size)
    assert found.exit_code == 0
    assert "chosen by trial" in found.stdout
    assert not (tmp_path / "out").exists()


def test_without_calibration_it_says_what_to_expect(run: Run, source: Path, tmp_path: Path) -> None:
    size = ("--kv-lora-rank", 24, "--qk-rope-head-dim", 8, "--no-calibration")
    found = run(source, "-o", tmp_path / "out", *size)
    assert found.exit_code == 0
    assert "healed" in found.stderr
    assert "output error" in found.stdout
    # As `quantize` makes the cache by default: the first of two layers in int8.
    size8, size4 = (cache_record(name).bytes_per_token(24, 8) for name in ("int8", "int4"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bytes_per_token"]["int4+int8"] == size8 + size4
    assert f"{size8 + size4:,} in int4 (first layer int8)" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--like-paper", "64", "--calibration", "self"), "d_kv=64"),
        (("--target-ratio", "0.5"), "what to calibrate on"),
        (("--target-ratio", "0.5", "--calibration", "no-such-file"), "no-such-file"),
    ],
)
def test_bad_options_exit_with_2(
    run: Run, source: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    found = run(source, "-o", tmp_path / "out", *arguments)
    assert found.exit_code == 2
    assert message in found.stderr
