"""`mla-deploy build`: the bundle of the single commands, in one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from support.models import save_checkpoint
from support.sources import byte_tokenizer, random_source, random_text

from mla_deploy.checkpoint import SINGLE_FILE
from mla_deploy.errors import UsageError
from mla_deploy.exporters import build as build_module
from mla_deploy.exporters.build import build_bundle
from mla_deploy.exporters.build_plan import BuildOptions

Invoke = Callable[..., Result]
ValuesOf = Callable[..., dict[str, Any]]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def states(values: dict[str, Any]) -> list[str]:
    return [values["steps"][name]["state"] for name in ("convert", "quantize", "export")]


class Convertible(NamedTuple):
    """A model of the Llama kind, and what its conversion needs."""

    path: Path
    text: Path

    @property
    def options(self) -> tuple[object, ...]:
        return ("--target-ratio", 0.5, "--calibration", self.text)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Convertible:
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"max_position_embeddings": 64}  # and with it the windows of calibration
    source = save_checkpoint(random_source("llama", **sizes), folder / "source", None)
    byte_tokenizer(source)
    return Convertible(source, random_text(folder, words=300))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def test_a_latent_model_becomes_the_bundle_of_the_single_commands(
    tiny_mla: Path, bundle: Path, outputs: Path, invoke: Invoke
) -> None:
    out = outputs / "out"
    made = invoke("build", tiny_mla, "-o", out)
    assert made.exit_code == 0, made.output
    assert contents(out) == contents(bundle)
    assert os.listdir(outputs) == ["out"]
    shown = {" ".join(line.split()) for line in made.stdout.splitlines()}
    assert "convert not needed" in shown
    assert "cache int4 (first layer int8)" in shown
    assert "cache 492 bytes a token" in shown
    assert f'next mla-deploy run {out} "Once upon a time"' in shown
    assert f"{out}.partial" in made.stderr


def test_what_is_left_out_is_told(tiny_mla: Path, outputs: Path, invoke: Invoke) -> None:
    """Such as the layers for multi-token prediction, which published checkpoints hold."""
    source = shutil.copytree(tiny_mla, outputs / "source")
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    tensors = load_file(source / SINGLE_FILE)
    for name in ("eh_proj", "enorm"):
        tensors[f"model.layers.{layers}.{name}.weight"] = torch.ones(4)
    save_file(tensors, source / SINGLE_FILE)
    made = invoke("build", source, "-o", outputs / "out", "--weights", "none")
    assert made.exit_code == 0, made.output
    assert "left out 2 tensors: multi-token prediction, which is not run" in made.stdout


def test_with_json_it_prints_what_each_step_did(
    tiny_mla: Path, outputs: Path, values_of: ValuesOf
) -> None:
    out = outputs / "out"
    found = values_of("build", tiny_mla, "-o", out, "--kv", "int8", "--weights", "int8")
    assert states(found) == ["not needed", "done", "done"]
    assert found["steps"]["quantize"]["recipe"]["cache_format"] == "int8"
    assert found["steps"]["quantize"]["recipe"]["linear"]["bits"] == 8
    assert found["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert found["kv_bytes_per_token"] == 4 * 168
    assert (found["bundle"], found["target"]) == (str(out), "cpu")


def test_a_calibration_reaches_the_quantisation(
    tiny_mla: Path, short_text: Path, outputs: Path, invoke: Invoke
) -> None:
    small, whole, out = outputs / "small", outputs / "whole", outputs / "out"
    text = ("--calibration", short_text)
    assert invoke("quantize", tiny_mla, "-o", small, *text).exit_code == 0
    assert invoke("export", small, "-o", whole).exit_code == 0
    assert invoke("build", tiny_mla, "-o", out, *text).exit_code == 0
    assert contents(out) == contents(whole)


def test_a_bundle_for_a_gpu_is_asked_for_by_the_target(
    quantized: Path, outputs: Path, invoke: Invoke, values_of: ValuesOf
) -> None:
    out = outputs / "out"
    assert values_of("build", quantized, "-o", out, "--target", "cuda")["target"] == "cuda"
    assert json.loads((out / "manifest.json").read_text())["cuda"] == {"dtype": "float16"}


@pytest.mark.slow
def test_an_engine_is_built_for_the_gpu_that_is_the_target(
    tiny_mla: Path, outputs: Path, values_of: ValuesOf
) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = values_of("build", tiny_mla, "-o", outputs / "out", "--target", "sm89")
    assert states(found) == ["not needed", "done", "done"]
    assert (outputs / "out" / "sm89.engine").is_file()
    assert [one["target"] for one in found["steps"]["export"]["engines"]] == ["sm89"]
    assert os.listdir(outputs) == ["out"]


def test_a_quantised_model_is_exported_only_and_it_says_so(
    quantized: Path, bundle: Path, outputs: Path, invoke: Invoke
) -> None:
    made = invoke("build", quantized, "-o", outputs / "out")
    assert made.exit_code == 0, made.output
    assert contents(outputs / "out") == contents(bundle)
    assert "is quantised already: it is only exported" in made.stderr
    shown = {" ".join(line.split()) for line in made.stdout.splitlines()}
    assert {"convert not needed", "quantize not needed"} <= shown
    assert os.listdir(outputs) == ["out"]


def test_a_model_of_the_llama_kind_is_converted_first(
    llama: Convertible, outputs: Path, invoke: Invoke
) -> None:
    model, small, whole, out = (outputs / name for name in ("model", "small", "whole", "out"))
    text = ("--calibration", llama.text)
    for command in (
        ("convert", llama.path, "-o", model, *llama.options),
        ("quantize", model, "-o", small, *text),
        ("export", small, "-o", whole),
    ):
        assert invoke(*command).exit_code == 0
    made = invoke("build", llama.path, "-o", out, *llama.options)
    assert made.exit_code == 0, made.output
    assert contents(out) == contents(whole)
    assert "kv_lora_rank" in made.stdout
    assert "KL divergence" in made.stdout
    assert not (outputs / "out.partial").exists()


def test_text_of_the_models_own_is_for_the_conversion_alone() -> None:
    options = BuildOptions(calibration=("self", "essay.txt"))
    assert options.quantized_by() == {"calibration": (str(Path("essay.txt").resolve()),)}
    assert BuildOptions(calibration=("self",)).quantized_by() == {}


@pytest.mark.parametrize("missing", ["both", "--target-ratio", "--calibration"])
def test_a_conversion_is_not_guessed(
    missing: str, llama: Convertible, outputs: Path, invoke: Invoke
) -> None:
    given = {"--target-ratio": 0.5, "--calibration": llama.text}
    options = [one for pair in given.items() if missing not in (pair[0], "both") for one in pair]
    result = invoke("build", llama.path, "-o", outputs / "out", *options)
    assert result.exit_code == 2
    found = next(line for line in result.stderr.splitlines() if "found:" in line)
    assert [name in found for name in given] == [missing in (name, "both") for name in given]
    assert os.listdir(outputs) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-ratio", 0.5), "latent already"),
        (("--calibration", "self"), "model's own"),
        (("--kv", "auto"), "mla-deploy quantize --help"),
        (("--weights", "auto"), "mla-deploy quantize --help"),
        (("--kv", "int5"), "int5"),
        (("--weights", "int3"), "int3"),
        (("--target", "sm42"), "cpu, cuda, sm80+, sm75"),
        (("--target", "tensorrt"), "cpu, cuda, sm80+, sm75"),
    ],
)
def test_options_that_do_not_fit_a_latent_model(
    options: tuple[object, ...], message: str, tiny_mla: Path, outputs: Path, invoke: Invoke
) -> None:
    result = invoke("build", tiny_mla, "-o", outputs / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(outputs) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("--kv", "int4"), ("--weights", "int4"), ("--calibration", "x"), ("--target-ratio", 0.5)],
)
def test_a_quantised_model_has_nothing_left_to_choose(
    name: str, value: object, quantized: Path, outputs: Path, invoke: Invoke
) -> None:
    result = invoke("build", quantized, "-o", outputs / "out", name, value)
    assert result.exit_code == 2
    assert "only exported" in result.stderr
    assert name in result.stderr
    assert os.listdir(outputs) == []


def test_a_bundle_is_not_built_again(bundle: Path, outputs: Path, invoke: Invoke) -> None:
    result = invoke("build", bundle, "-o", outputs / "out")
    assert result.exit_code == 2
    assert "mla-deploy run" in result.stderr


def fail(*_: object, **__: object) -> None:
    raise AssertionError("a step was begun")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv", "int5"), "int5"),
        (("--weights", "int3"), "int3"),
        (("--kv", "auto"), "quantize"),
        (("--target", "sm42"), "sm42"),
        (("--target-ratio", 2), "target ratio"),
    ],
)
def test_what_is_wrong_with_a_later_step_is_said_before_the_conversion(
    options: tuple[object, ...],
    message: str,
    llama: Convertible,
    outputs: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_module, "convert_checkpoint", fail)
    result = invoke("build", llama.path, "-o", outputs / "out", *llama.options, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert os.listdir(outputs) == []


@pytest.mark.parametrize("model", ["latent", "llama"])
def test_a_disk_that_is_too_small_is_found_before_the_first_step(
    model: str,
    tiny_mla: Path,
    llama: Convertible,
    outputs: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in ("convert_checkpoint", "quantize_checkpoint"):
        monkeypatch.setattr(build_module, step, fail)
    # tiny-mla: enough for the quantised checkpoint, and not for its bundle too
    free = {"latent": 8_000_000, "llama": 100_000}[model]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    given = (tiny_mla,) if model == "latent" else (llama.path, *llama.options)
    result = invoke("build", *given, "-o", outputs / "out")
    assert result.exit_code == 2, result.output
    assert "too full" in result.stderr
    assert os.listdir(outputs) == []


def test_memory_for_an_engine_is_checked_before_the_first_step(
    tiny_mla: Path, outputs: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(build_module, "quantize_checkpoint", fail)
    monkeypatch.setattr("mla_deploy.exporters.tensorrt.build.available_memory", lambda: 1 << 20)
    result = invoke("build", tiny_mla, "-o", outputs / "out", "--target", "sm89")
    assert result.exit_code == 2, result.output
    assert "too little memory" in result.stderr
    assert os.listdir(outputs) == []


def test_an_output_is_replaced_only_when_asked(
    quantized: Path, outputs: Path, invoke: Invoke
) -> None:
    out = outputs / "out"
    assert invoke("build", quantized, "-o", out).exit_code == 0
    again = invoke("build", quantized, "-o", out)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert invoke("build", quantized, "-o", out, "--force").exit_code == 0


KILLED = """
import os, signal, sys
from mla_deploy.exporters.build import build_bundle
from mla_deploy.exporters.build_plan import BuildOptions

def progress(done, total, what):
    if what.startswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

build_bundle(sys.argv[1], sys.argv[2],
             BuildOptions(target_ratio=0.5, calibration=(sys.argv[3],)), progress)
"""


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("convert: layer 0", ["done", "done", "done"]),
        ("quantize: model.layers.1", ["done before", "done", "done"]),
        ("export: ", ["done before", "done before", "done"]),
    ],
)
def test_a_killed_build_goes_on_where_it_stopped(
    at: str, expected: list[str], llama: Convertible, outputs: Path, invoke: Invoke,
    values_of: ValuesOf, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = outputs / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, (llama.path, out, llama.text, at))], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(outputs) == ["out.partial"]

    command = ("build", llama.path, "-o", out, *llama.options)
    other = invoke(*command, "--kv", "int8")
    assert other.exit_code == 2
    assert "unfinished work of another command" in other.stderr
    assert os.listdir(outputs) == ["out.partial"]

    if expected[0] == "done before":
        monkeypatch.setattr(build_module, "convert_checkpoint", fail)
    resumed = values_of(*command)
    assert states(resumed) == expected
    if expected[0] == "done":
        assert resumed["steps"]["convert"]["resumed_layers"] == 1
    assert os.listdir(outputs) == ["out"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"]["cache_format"] == "int4"


def test_an_error_after_a_finished_step_keeps_it_and_says_so(
    tiny_mla: Path, bundle: Path, outputs: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = outputs / "out"
    with monkeypatch.context() as broken:

        def refuse(*_: object, **__: object) -> None:
            raise UsageError("not today")

        broken.setattr(build_module, "export_onnx", refuse)
        failed = invoke("build", tiny_mla, "-o", out)
    assert failed.exit_code == 2
    assert f"kept in {out}.partial" in failed.stderr
    assert os.listdir(outputs) == ["out.partial"]
    monkeypatch.setattr(build_module, "quantize_checkpoint", fail)
    again = invoke("build", tiny_mla, "-o", out)
    assert again.exit_code == 0, again.output
    assert f"goes on from what is in {out}.partial" in again.stderr
    assert contents(out) == contents(bundle)
    assert os.listdir(outputs) == ["out"]


def test_what_came_to_the_output_meanwhile_stays_unless_it_is_to_be_replaced(
    tiny_mla: Path, bundle: Path, outputs: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = outputs / "out"
    export = build_module.export_onnx

    def late(*arguments: Any, **options: Any) -> Any:
        out.mkdir()
        (out / "manifest.json").write_text("another build's")
        return export(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "export_onnx", late)
        failed = invoke("build", tiny_mla, "-o", out)
    assert failed.exit_code == 2
    assert f"{out} exists already" in failed.stderr
    assert f"kept in {out}.partial" in failed.stderr
    assert os.listdir(out) == ["manifest.json"]
    assert invoke("build", tiny_mla, "-o", out, "--force").exit_code == 0
    assert contents(out) == contents(bundle)
    assert os.listdir(outputs) == ["out"]


def test_a_converted_checkpoint_goes_when_the_quantised_one_is_there(
    llama: Convertible, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    export = build_module.export_onnx

    def look(*arguments: Any, **options: Any) -> Any:
        seen.append(sorted(os.listdir(outputs / "out.partial")))
        return export(*arguments, **options)

    monkeypatch.setattr(build_module, "export_onnx", look)
    options = BuildOptions(target_ratio=0.5, calibration=(str(llama.text),))
    build_bundle(llama.path, outputs / "out", options)
    assert seen == [["job.json", "quantized"]]


def test_control_c_keeps_the_work(
    tiny_mla: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("mla_deploy.shards._SHARD_BYTES", 1)

    def interrupt(done: int, total: int, what: str) -> None:
        if what.startswith("quantize: model.layers.2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(tiny_mla, outputs / "out", progress=interrupt, say=said.append)
    assert os.listdir(outputs) == ["out.partial"]
    assert "goes on from it" in said[-1]
    report = build_bundle(tiny_mla, outputs / "out")
    assert report.steps["quantize"] == "done"
    assert os.listdir(outputs) == ["out"]


def test_a_folder_of_somebody_elses_is_not_taken_for_work(
    tiny_mla: Path, outputs: Path, invoke: Invoke
) -> None:
    work = outputs / "out.partial"
    work.mkdir()
    (work / "precious.txt").write_text("mine")
    result = invoke("build", tiny_mla, "-o", outputs / "out")
    assert result.exit_code == 2
    assert (work / "precious.txt").read_text() == "mine"
    assert not (outputs / "out").exists()
