"""What users get wrong: one clear error each, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

Invoke = Callable[..., Result]
Break = Callable[[Path], None]


def edit_json(name: str, **changes: Any) -> Break:
    def apply(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


NORM = "model.layers.1.input_layernorm.weight"
PROJECTION = "model.layers.2.self_attn.o_proj.weight"


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[PROJECTION][3, 4] = float("nan")


def cut_a_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors[PROJECTION] = tensors[PROJECTION][:-1].contiguous()


BROKEN_CHECKPOINTS: dict[str, tuple[Break, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "unknown model_type": (edit_json("config.json", model_type="gpt9"), "gpt9"),
    "unknown key": (edit_json("config.json", sliding_window=128), "sliding_window"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "cut off": (truncate, "not a whole safetensors file"),
    "missing shard": (lose_a_shard, "model-00001-of-00002.safetensors is missing"),
    "missing tensor": (edit_weights(lambda tensors: tensors.pop(NORM)), f"lacks the tensor {NORM}"),
    "wrong shape": (edit_weights(cut_a_row), f"the tensor {PROJECTION} has the wrong shape"),
    "NaN": (edit_weights(set_nan), PROJECTION),
    "a tensor of no use": (
        edit_weights(lambda t: t.update({f"{PROJECTION}.bias": torch.ones(4)})),
        "does not use",
    ),
    "bytes": (
        edit_weights(lambda t: t.update({PROJECTION: t[PROJECTION].to(torch.uint8)})),
        PROJECTION,
    ),
}


@pytest.fixture
def checkpoint(tiny_mla: Path, tmp_path: Path) -> Path:
    """A copy of tiny-mla that may be broken."""
    copy = tmp_path / "source"
    shutil.copytree(tiny_mla, copy)
    return copy


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def assert_users_error(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["quantize", "export", "build"])
@pytest.mark.parametrize("problem", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint(
    command: str, problem: str, checkpoint: Path, outputs: Path, invoke: Invoke
) -> None:
    break_it, message = BROKEN_CHECKPOINTS[problem]
    break_it(checkpoint)
    assert_users_error(invoke(command, checkpoint, "-o", outputs / "out"), message)
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize("problem", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_for_tensorrt(
    problem: str, checkpoint: Path, outputs: Path, invoke: Invoke
) -> None:
    break_it, message = BROKEN_CHECKPOINTS[problem]
    break_it(checkpoint)
    options = ("--to", "tensorrt", "--onnx-only")
    assert_users_error(invoke("export", checkpoint, "-o", outputs / "out", *options), message)
    assert list(outputs.iterdir()) == []


WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}
BROKEN_TOKENIZERS: dict[str, tuple[Break, str]] = {
    "no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
    "decoder": (edit_json("tokenizer.json", decoder=WORD_PIECE), "decoder"),
    "end token": (edit_json("tokenizer_config.json", eos_token="<gone>"), "<gone>"),
    "template": (edit_json("tokenizer_config.json", chat_template="{% for %}"), "chat template"),
    "end id": (edit_json("generation_config.json", eos_token_id=10**30), "no token id"),
    "ranks": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "tiktoken.model"),
        "words",
    ),
}
"""Which `run` or `chat` would meet."""


@pytest.mark.parametrize(
    "command", ["quantize", "export", "build", "export --to tensorrt --onnx-only"]
)
@pytest.mark.parametrize("problem", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer(
    command: str, problem: str, checkpoint: Path, outputs: Path, invoke: Invoke
) -> None:
    break_it, message = BROKEN_TOKENIZERS[problem]
    break_it(checkpoint)
    name, *options = command.split()
    assert_users_error(invoke(name, checkpoint, "-o", outputs / "out", *options), message)
    assert list(outputs.iterdir()) == []


def test_quantize_without_a_tokenizer(checkpoint: Path, outputs: Path, invoke: Invoke) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (checkpoint / name).unlink()
    result = invoke("quantize", checkpoint, "-o", outputs / "out")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["export", "build"])
def test_export_without_a_tokenizer(
    command: str, checkpoint: Path, outputs: Path, invoke: Invoke
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert_users_error(invoke(command, checkpoint, "-o", outputs / "out"), "tokenizer.json")
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "export", "build"])
def test_an_output_that_exists_is_not_touched(
    command: str, tiny_mla: Path, outputs: Path, invoke: Invoke
) -> None:
    out = outputs / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert_users_error(invoke(command, tiny_mla, "-o", out), "exists")
    assert [file.read_text() for file in out.iterdir()] == ["mine"]
    assert list(outputs.iterdir()) == [out]


@pytest.mark.parametrize("command", ["quantize", "export", "build"])
def test_an_output_without_a_parent(
    command: str, tiny_mla: Path, outputs: Path, invoke: Invoke
) -> None:
    result = invoke(command, tiny_mla, "-o", outputs / "no" / "such" / "out")
    assert_users_error(result, str(outputs / "no" / "such"))
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "export", "build"])
def test_a_disk_that_is_full(command: str, tiny_mla: Path, outputs: Path) -> None:
    code = "from mla_deploy.cli import main; main()"
    arguments = [command, tiny_mla, "-o", outputs / "out", "--json"]

    def limit_files() -> None:
        # A file may not grow beyond 64 kB: to the program, the same as a disk that fills up.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
        timeout=120,
    )
    assert found.returncode == 2, found.stderr
    assert json.loads(found.stdout)["error"]["exit_code"] == 2
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv", "int5"], "int5"),
        (["--kv-first", "int5"], "int5"),
        (["--kv-first", "auto"], "auto"),
        (["--weights", "int3"], "int3"),
        (["--group", "48"], "48"),
        (["--zeros", "some"], "some"),
        (["--experts", "int3"], "int3"),
        (["--embedding", "fp8"], "fp8"),
        (["--lm-head", "fp8"], "fp8"),
    ],
)
def test_quantize_options_out_of_range(
    options: list[str], message: str, tiny_mla: Path, outputs: Path, invoke: Invoke
) -> None:
    result = invoke("quantize", tiny_mla, "-o", outputs / "out", *options)
    assert_users_error(result, message)
    assert "allowed:" in result.stderr
    assert list(outputs.iterdir()) == []


def test_export_to_an_unknown_format(tiny_mla: Path, outputs: Path, invoke: Invoke) -> None:
    result = invoke("export", tiny_mla, "-o", outputs / "out", "--to", "gguf")
    assert_users_error(result, "gguf")
    assert "onnx" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm89"], "no such target"),
        (["--target", "cpu", "--target", "cuda"], "has one target"),
        (["--onnx-only"], "without it"),
        (["--to", "tensorrt"], "none is named"),
        (["--to", "tensorrt", "--target", "sm42"], "does not build for this GPU"),
        (["--to", "tensorrt", "--onnx-only", "--dtype", "fp8"], "dtype is out of range"),
        (["--to", "tensorrt", "--onnx-only", "--plugin"], "cannot compute this kv_lora_rank"),
        (["--plugin"], "an option of TensorRT"),
    ],
)
def test_export_options_that_do_not_fit(
    options: list[str], message: str, tiny_mla: Path, outputs: Path, invoke: Invoke
) -> None:
    result = invoke("export", tiny_mla, "-o", outputs / "out", *options)
    assert_users_error(result, message)
    assert list(outputs.iterdir()) == []


def test_a_quantised_checkpoint_is_not_quantised_again(
    quantized: Path, outputs: Path, invoke: Invoke
) -> None:
    assert_users_error(invoke("quantize", quantized, "-o", outputs / "out"), "quantised already")
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["run", "BUNDLE", "a"], ["bench", "BUNDLE"], ["eval", "BUNDLE", "--text", "TEXT"]],
    ids=["run", "bench", "eval"],
)
@pytest.mark.parametrize("problem", ["leaves the folder", "missing file", "damaged"])
def test_a_broken_bundle(
    arguments: list[str],
    problem: str,
    bundle: Path,
    short_text: Path,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    if problem == "leaves the folder":
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"][0]["path"] = "../model.onnx"
        (copy / "manifest.json").write_text(json.dumps(manifest))
        message = "leaves the bundle"
    elif problem == "missing file":
        (copy / "model.onnx.data").unlink()
        message = "model.onnx.data is missing"
    else:
        (copy / "tokenizer.json").write_bytes(b"x" * (copy / "tokenizer.json").stat().st_size)
        message = "tokenizer.json is damaged"
    named = {"BUNDLE": copy, "TEXT": short_text}
    assert_users_error(invoke(*(named.get(one, one) for one in arguments)), message)


@pytest.mark.parametrize("command", [["run", "X", "a"], ["bench", "X"]], ids=["run", "bench"])
def test_a_checkpoint_in_place_of_a_bundle(
    command: list[str], tiny_mla: Path, invoke: Invoke
) -> None:
    result = invoke(*(tiny_mla if one == "X" else one for one in command))
    assert_users_error(result, "is not a bundle")
    assert "mla-deploy build" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--min-p", "-0.5"], "min_p"),
        (["--top-k", "-1"], "top_k"),
        (["--stop", ""], "stop"),
        (["--max-tokens", "0"], "0"),
        (["--chat"], "chat template"),
    ],
)
def test_run_options_out_of_range(
    options: list[str], message: str, bundle: Path, invoke: Invoke
) -> None:
    assert_users_error(invoke("run", bundle, "one", *options), message)


def test_run_with_a_prompt_that_is_not_utf8_or_empty(bundle: Path, invoke: Invoke) -> None:
    assert_users_error(invoke("run", bundle, "-", input=b"caf\xe9"), "not UTF-8")
    assert_users_error(invoke("run", bundle, ""), "no tokens")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"caf\xe9 au lait", "not UTF-8"), (b"a", "too short"), (None, "be read")],
)
def test_eval_with_an_unusable_text(
    content: bytes | None, message: str, bundle: Path, tmp_path: Path, invoke: Invoke
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert_users_error(invoke("eval", bundle, "--text", text), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "5000"], "4096, the model's context"),
        (["--window", "1"], "window is out of range"),
        (["--window", "64", "--stride", "65"], "stride is out of range"),
    ],
)
def test_eval_windows_out_of_range(
    options: list[str], message: str, bundle: Path, short_text: Path, invoke: Invoke
) -> None:
    assert_users_error(invoke("eval", bundle, "--text", short_text, *options), message)


def test_eval_against_another_tokenizer(
    bundle: Path, checkpoint: Path, short_text: Path, invoke: Invoke
) -> None:
    spec = json.loads((checkpoint / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:200]
    (checkpoint / "tokenizer.json").write_text(json.dumps(spec))
    result = invoke("eval", bundle, "--reference", checkpoint, "--text", short_text)
    assert_users_error(result, "another tokenizer")


def test_bench_beyond_the_context(bundle: Path, invoke: Invoke) -> None:
    result = invoke("bench", bundle, "--depth", "0,4000")
    assert_users_error(result, "4096 together")
