"""`quantize_checkpoint` from end to end: what it writes, how it fails, how it resumes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mla_deploy.output as output_module
import mla_deploy.shards as shards_module
from mla_deploy.checkpoint import SINGLE_FILE, Checkpoint
from mla_deploy.errors import CheckpointError, ConfigError, MlaError, OutputError, UsageError
from mla_deploy.model import build, forward_window, load_model
from mla_deploy.modules.base import checkpoint_shapes
from mla_deploy.packing import dequantize
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.recipe import WeightFormat
from mla_deploy.tokenizer import Tokenizer

TABLE = "model.embed_tokens.weight"

OPTIONS = [
    QuantizeOptions(),
    QuantizeOptions(kv="fp32", weights="none"),
    QuantizeOptions(kv="int8", weights="int8", zeros="exact"),
    QuantizeOptions(weights="int4", experts="int8", embedding="int4", lm_head="none"),
    QuantizeOptions(weights="none", embedding="fp16", lm_head="int4"),
    QuantizeOptions(weights="int4", embedding="none", rotate=False),
]


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    return forward_window(load_model(path), Checkpoint(path).config, ids)


def load_ids(model: Path) -> torch.Tensor:
    """Tokens of an ordinary text. Shapes: [1, S]."""
    text = "It was a bright cold day in April, and the clocks were striking. " * 3
    return torch.tensor([Tokenizer.open(model).encode(text)])


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    for file in to.iterdir():
        file.chmod(0o644)
    return to


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model", ["dense_v2", "moe_v3", "minicpm3"])
def test_the_result_is_a_complete_checkpoint(
    model: str, options: QuantizeOptions, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(model)
    out = tmp_path / "out"
    report = quantize_checkpoint(source, out, options)
    made = Checkpoint(out)
    shapes = checkpoint_shapes(build(made.config))
    made.check(shapes)
    assert set(made.tensors) == set(shapes)
    assert report.output_bytes == sum(info.bytes for info in made.tensors.values())
    assert made.config.recipe == report.recipe
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "model-00001.safetensors",
        "model.safetensors.index.json",
    }  # fmt: skip
    assert bool(torch.isfinite(logits(out, torch.randint(0, 192, (1, 40)))).all())
    original = Checkpoint(source)
    for name in made.tensors:
        base, _, leaf = name.rpartition(".")
        if leaf != "codes" or base.endswith("kv_a_proj_with_mqa"):  # which may be rotated
            continue
        parts = [made.read(f"{base}.{part}") for part in ("codes", "scales", "zeros")]
        stored = f"{base}.weight" if f"{base}.weight" in original.tensors else TABLE
        weight = original.read(stored).float()
        bits = 8 * parts[0].shape[-1] // weight.shape[-1]
        error = (dequantize(*parts, bits, torch.float32) - weight).norm() / weight.norm()
        assert float(error) < (0.1 if bits == 4 else 0.008), name


def test_a_trained_model_stays_itself(tiny_mla: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_mla, tmp_path / "out")
    ids = load_ids(tiny_mla)
    expected, found = logits(tiny_mla, ids), logits(tmp_path / "out", ids)
    assert float((found - expected).norm() / expected.norm()) < 0.12
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.75


def test_without_quantisation_nothing_changes(moe_v3: Path, tmp_path: Path) -> None:
    quantize_checkpoint(moe_v3, tmp_path / "out", QuantizeOptions(kv="fp32", weights="none"))
    ids = torch.randint(0, 192, (2, 50))
    assert torch.equal(logits(tmp_path / "out", ids), logits(moe_v3, ids))


@pytest.mark.parametrize("model", ["dense_v2", "minicpm3"])
def test_int8_is_close(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(model)
    quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(kv="int8", weights="int8"))
    ids = torch.randint(0, 192, (2, 50))
    expected = logits(source, ids)
    error = (logits(tmp_path / "out", ids) - expected).norm() / expected.norm()
    assert float(error) < 0.06


def test_matrices_keep_their_names(moe_v3: Path, tmp_path: Path) -> None:
    quantize_checkpoint(moe_v3, tmp_path / "out", QuantizeOptions())
    source, made = Checkpoint(moe_v3), Checkpoint(tmp_path / "out")
    name = "model.layers.1.mlp.experts.5.down_proj"
    parts = [made.read(f"{name}.{part}") for part in ("codes", "scales", "zeros")]
    weight = source.read(f"{name}.weight").float()
    error = (dequantize(*parts, 4, torch.float32) - weight).norm() / weight.norm()
    assert float(error) < 0.12
    assert made.tensors["lm_head.codes"].shape == (192, 128)  # tied in the source, int8 here
    assert made.tensors["model.embed_tokens.weight"].dtype == "F16"
    assert made.tensors["model.layers.0.self_attn.kv_b_proj.weight"].dtype == "F16"


def test_the_group_follows_the_model(moe_v3: Path, dense_v2: Path, tmp_path: Path) -> None:
    # q_lora_rank 96 takes groups of 32 at most
    recipe = quantize_checkpoint(moe_v3, tmp_path / "moe", QuantizeOptions()).recipe
    assert recipe.linear == WeightFormat(4, 32)
    assert recipe.experts == WeightFormat(4, 64)
    assert recipe.lm_head == WeightFormat(8, 64)
    recipe = quantize_checkpoint(dense_v2, tmp_path / "dense", QuantizeOptions()).recipe
    assert recipe.linear == WeightFormat(4, 64)
    assert recipe.experts is None
    with pytest.raises(UsageError, match="q_b_proj has 96 inputs") as error:
        quantize_checkpoint(moe_v3, tmp_path / "no", QuantizeOptions(group=64))
    assert error.value.allowed == "32"
    assert not (tmp_path / "no").exists()


def test_the_report_counts(moe_v3: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    report = quantize_checkpoint(
        moe_v3, tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    assert calls[-1][0] == calls[-1][1]
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert report.kinds["experts"].tensors == 2 * 8 * 3
    assert report.kinds["experts"].nmse == pytest.approx(0.0075, rel=0.1)
    assert report.kinds["lm_head"].nmse == pytest.approx(3e-5, rel=0.5)
    assert report.kinds["embedding"].nmse is None
    assert sum(kind.output_bytes for kind in report.kinds.values()) == report.output_bytes
    assert report.source_bytes == sum(i.bytes for i in Checkpoint(moe_v3).tensors.values())
    json.dumps(report.to_json())


def test_companions_come_along(tiny_mla: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_mla, tmp_path / "out", QuantizeOptions())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_mla / name).read_bytes()


def test_prediction_layers_are_left_out_and_named(moe_v3: Path, tmp_path: Path) -> None:
    source = copy(moe_v3, tmp_path / "source")
    tensors = load_file(source / SINGLE_FILE)
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(4, 4)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4)
    save_file(tensors, source / SINGLE_FILE)
    report = quantize_checkpoint(source, tmp_path / "out")
    assert sorted(report.skipped.values()) == [
        ("model.layers.0.self_attn.rotary_emb.inv_freq",),
        ("model.layers.3.eh_proj.weight",),
    ]


# What goes wrong: one clear error each, and nothing left behind.


def break_tensor(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, folder / SINGLE_FILE)


def with_value(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


LAST = "model.layers.2.mlp.experts.7.up_proj.weight"
BROKEN = {
    "not a number": (LAST, with_value(float("nan")), "not finite"),
    "infinite": (LAST, with_value(float("-inf")), "not finite"),
    "too large": (LAST, with_value(1e30), f"{LAST}.*too large"),
    "too large for float16": (
        "model.embed_tokens.weight", with_value(1e6), "embed_tokens.*float16 cannot hold",
    ),
    "missing": (LAST, lambda tensor: None, f"lacks the tensor {LAST}"),
    "shape": (LAST, lambda tensor: tensor[:-1].clone(), "wrong shape"),
    "type": (LAST, lambda tensor: tensor.to(torch.float8_e4m3fn), "type that is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tensor(case: str, moe_v3: Path, tmp_path: Path) -> None:
    name, change, message = BROKEN[case]
    source = copy(moe_v3, tmp_path / "source")
    break_tensor(source, name, change)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_an_unknown_tensor_is_refused(moe_v3: Path, tmp_path: Path) -> None:
    source = copy(moe_v3, tmp_path / "source")
    tensors = load_file(source / SINGLE_FILE)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)
    save_file(tensors, source / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="does not use") as error:
        quantize_checkpoint(source, tmp_path / "out")
    assert "q_norm" in str(error.value)
    assert os.listdir(tmp_path) == ["source"]


def test_an_unknown_cache_format(moe_v3: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown cache format") as error:
        quantize_checkpoint(moe_v3, tmp_path / "out", QuantizeOptions(kv="int5"))
    assert "int4" in str(error.value.allowed)


@pytest.mark.parametrize(
    "changes",
    [{"weights": "int3"}, {"group": 48}, {"zeros": "none"}, {"experts": "fp16"}, {"lm_head": "x"}],
)
def test_unknown_options(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        QuantizeOptions(**changes)
    assert error.value.allowed


def test_a_quantised_source_is_refused(moe_v3: Path, tmp_path: Path) -> None:
    quantize_checkpoint(moe_v3, tmp_path / "once")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert os.listdir(tmp_path) == ["once"]


def test_an_existing_output_is_kept(moe_v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        quantize_checkpoint(moe_v3, out)
    with pytest.raises(OutputError, match="did not write it"):
        quantize_checkpoint(moe_v3, out, force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["precious"]


def test_force_replaces_a_result_at_the_very_end(
    moe_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(moe_v3, out)
    before = files(out)

    def fail(*_: object) -> None:
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        quantize_checkpoint(moe_v3, out, QuantizeOptions(kv="int8"), fail, force=True)
    assert files(out) == before
    quantize_checkpoint(moe_v3, out, QuantizeOptions(kv="int8"), force=True)
    assert Checkpoint(out).config.recipe.cache_format == "int8"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_the_output_must_be_apart_from_the_source(place: str, moe_v3: Path, tmp_path: Path) -> None:
    source = copy(moe_v3, tmp_path / "source")
    with pytest.raises(OutputError, match="apart from the source"):
        quantize_checkpoint(source, source / place, force=True)
    assert (source / SINGLE_FILE).exists()


def test_an_output_without_a_parent(moe_v3: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be made"):
        quantize_checkpoint(moe_v3, tmp_path / "no" / "out")


def test_too_little_space_is_seen_before_work(
    moe_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: usage)
    calls: list[object] = []
    with pytest.raises(OutputError, match="too full") as error:
        quantize_checkpoint(moe_v3, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert "needed" in str(error.value.allowed)
    assert not calls
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up(
    moe_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards_module.os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written") as error:
        quantize_checkpoint(moe_v3, tmp_path / "out")
    assert error.value.found == "No space left on device"
    assert error.value.hint
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
import mla_deploy.shards as shards
from mla_deploy.quant.quantize import quantize_checkpoint

calls = 0

def progress(done, total, what):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

shards._SHARD_BYTES = 60_000
quantize_checkpoint(sys.argv[1], sys.argv[2], None, progress)
"""


@pytest.mark.parametrize("after", [1, 60])
def test_a_killed_run_resumes_to_the_same_bytes(
    after: int, moe_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_SHARD_BYTES", 60_000)
    whole = quantize_checkpoint(moe_v3, tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(moe_v3), str(out), str(after)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / "out.partial"
    # what a kill in the middle of a write leaves
    (partial / ".model-00099.safetensors.tmp").write_bytes(b"half")
    with (partial / ".errors.jsonl").open("a") as handle:
        handle.write('["model.lay')

    if after > 1:  # or nothing is finished
        with pytest.raises(OutputError, match="another command") as error:
            quantize_checkpoint(moe_v3, out, QuantizeOptions(kv="int8"))
        assert error.value.found == "--kv int4, not int8"
        assert partial.exists()

    resumed = quantize_checkpoint(moe_v3, out)
    assert (resumed.resumed_bytes > 0) == (after > 1)
    assert files(out) == files(tmp_path / "whole")
    assert resumed.kinds == whole.kinds
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_fills_up_costs_only_what_was_not_finished(
    after: int, moe_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call goes on, and needs room for the rest alone."""
    monkeypatch.setattr(shards_module, "_SHARD_BYTES", 60_000)
    whole = quantize_checkpoint(moe_v3, tmp_path / "whole")
    written, said = [], []

    def fill(_: int) -> None:
        if len(written) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module.os, "fsync", fill)
        with pytest.raises(OutputError, match="cannot be written"):
            quantize_checkpoint(moe_v3, tmp_path / "out", say=said.append)
    if not after:
        assert not said
        assert sorted(os.listdir(tmp_path)) == ["whole"]
        return
    assert f"kept in {tmp_path / 'out.partial'}: the same command goes on" in said[0]
    usage = shutil.disk_usage(tmp_path)._replace(free=whole.output_bytes - after * 60_000)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: usage)
    assert quantize_checkpoint(moe_v3, tmp_path / "out").resumed_bytes >= after * 60_000
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_changed_source_is_not_mixed_with_old_work(
    moe_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_SHARD_BYTES", 1)
    source = copy(moe_v3, tmp_path / "source")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", None, interrupt)
    assert (tmp_path / "out.partial").exists()
    break_tensor(source, LAST, with_value(0.5))
    with pytest.raises(OutputError, match="another command") as error:
        quantize_checkpoint(source, tmp_path / "out")
    assert error.value.found == "model.safetensors changed"


def test_two_runs_do_not_write_the_same_folder(moe_v3: Path, tmp_path: Path) -> None:
    found: list[MlaError] = []

    def again(*_: object) -> None:
        if not found:
            with pytest.raises(OutputError, match="another run") as error:
                quantize_checkpoint(moe_v3, tmp_path / "out")
            found.append(error.value)

    quantize_checkpoint(moe_v3, tmp_path / "out", None, again)
    assert found
    assert os.listdir(tmp_path) == ["out"]
