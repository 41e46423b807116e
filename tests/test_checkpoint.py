"""Reading and writing checkpoints: round trips, and what a broken one says."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import random_model, save_checkpoint

import mla_deploy.checkpoint as checkpoint_module
import mla_deploy.shards as shards_module
from mla_deploy.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
)
from mla_deploy.errors import CheckpointError, ConfigError, MlaError, OutputError
from mla_deploy.inspection import inspect_model
from mla_deploy.model import load_model
from mla_deploy.output import writing
from mla_deploy.shards import ShardWriter

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dense model, in one file."""
    model = random_model("deepseek_v2", moe=False, yarn=False, q_lora=False)
    return save_checkpoint(model, tmp_path_factory.mktemp("saved"), None)


@pytest.fixture
def single(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return _copied(saved, tmp_path / "single")


@pytest.fixture
def sharded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model in several shards."""
    folder = _copied(saved, tmp_path / "sharded")
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    monkeypatch.setattr(shards_module, "_SHARD_BYTES", 100_000)
    writer = ShardWriter(folder)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    return folder


def _copied(saved: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", SINGLE_FILE):
        (folder / name).write_bytes((saved / name).read_bytes())
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def error_of(folder: Path) -> MlaError:
    """What opening or loading says; a message always tells what to do or what was found."""
    with pytest.raises(MlaError) as caught:
        load_model(folder)
    assert caught.value.found or caught.value.hint or caught.value.allowed
    return caught.value


# Round trips


def test_shards_hold_what_one_file_holds(single: Path, sharded: Path) -> None:
    one, many = Checkpoint(single), Checkpoint(sharded)
    assert len({info.file for info in many.tensors.values()}) > 2
    assert set(one.tensors) == set(many.tensors)
    for name in one.tensors:
        assert torch.equal(one.read(name), many.read(name))
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(one.tensors)
    assert index["metadata"]["total_size"] == sum(info.bytes for info in one.tensors.values())


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_library_reads_what_is_written(count: int, tmp_path: Path) -> None:
    tensors = {
        "codes": torch.randint(0, 255, (count, 3), dtype=torch.uint8),
        "double": torch.randn(count, dtype=torch.float64),
        "float": torch.randn(count, 2),
        "half": torch.randn(count).half(),
        "brain": torch.randn(2, count).bfloat16().t(),  # not contiguous
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 4),
    }
    writer = ShardWriter(tmp_path)
    writer.add_all(tensors)
    writer.finish()
    with safe_open(tmp_path / "model-00001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype is tensor.dtype
            assert torch.equal(found, tensor)


def test_tensors_that_belong_together_share_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_SHARD_BYTES", 10)
    writer = ShardWriter(tmp_path)
    for matrix in "ab":
        writer.add_all({f"{matrix}.{part}": torch.zeros(4) for part in ("codes", "scales")})
    writer.finish()
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    assert weight_map["a.codes"] == weight_map["a.scales"] != weight_map["b.codes"]


def test_a_writer_goes_on_after_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_SHARD_BYTES", 10)
    first = ShardWriter(tmp_path)
    first.add("a", torch.zeros(4))
    (tmp_path / ".model-00002.safetensors.tmp").write_bytes(b"cut off")
    second = ShardWriter(tmp_path)
    assert second.is_done("a")
    assert not second.is_done("b")
    assert second.done_bytes == 16
    second.add("b", torch.ones(4))
    second.finish()
    assert sorted(os.listdir(tmp_path)) == [
        "model-00001.safetensors",
        "model-00002.safetensors",
        INDEX_FILE,
    ]


# Broken checkpoints


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(kept: int, single: Path) -> None:
    file = single / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:kept])
    error = error_of(single)
    assert isinstance(error, CheckpointError)
    assert "not a whole safetensors file" in error.what
    assert str(file) in error.what


def test_a_header_that_claims_to_be_huge(single: Path) -> None:
    file = single / SINGLE_FILE
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    assert "not a whole safetensors file" in error_of(single).what


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, single: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM].to(dtype)
        tensors[NORM][-1] = value

    change_tensors(single, spoil)
    error = error_of(single)
    assert "not finite" in error.what
    assert NORM in error.what
    assert error.found == "1 of 96"


def test_only_the_last_value_of_a_large_tensor_is_broken(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_CHECK_VALUES", 100)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][-1, -1] = float("nan")

    change_tensors(single, spoil)
    assert "lm_head.weight" in error_of(single).what


def test_a_missing_tensor(single: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[NORM]

    change_tensors(single, drop)
    assert f"lacks the tensor {NORM}" in error_of(single).what


def test_a_wrong_shape(single: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM][:-1].clone()

    change_tensors(single, cut)
    error = error_of(single)
    assert "wrong shape" in error.what
    assert (error.found, error.allowed) == ("[95]", "[96]")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.uint8])
def test_a_type_that_is_not_supported(dtype: torch.dtype, single: Path) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM].to(dtype)

    change_tensors(single, convert)
    error = error_of(single)
    assert "type that is not supported" in error.what
    assert "BF16" in str(error.allowed)


def test_a_tensor_that_the_model_does_not_use(single: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)

    change_tensors(single, add)
    error = error_of(single)
    assert "does not use" in error.what
    assert "q_norm" in str(error.found)
    with pytest.raises(CheckpointError, match="does not use"):
        inspect_model(single, verify=True)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002.safetensors").unlink()
    error = error_of(sharded)
    assert "model-00002.safetensors is missing" in error.what
    assert "expects" in str(error.found)


def test_a_truncated_shard(sharded: Path) -> None:
    file = sharded / "model-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "model-00002.safetensors is not a whole" in error_of(sharded).what


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b", "", "..", 7, [1]])
def test_an_index_that_leads_outside(name: object, sharded: Path) -> None:
    save_file({NORM: torch.ones(96)}, sharded.parent / "outside.safetensors")
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    change_json(sharded / INDEX_FILE, weight_map={**weight_map, NORM: name})
    error = error_of(sharded)
    assert "outside its folder" in error.what
    assert error.found == str(name)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 5000])
def test_an_index_that_is_no_index(content: str, sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text(content)
    with pytest.raises(MlaError):
        Checkpoint(sharded)


def test_pickled_weights_are_never_loaded(single: Path) -> None:
    (single / SINGLE_FILE).rename(single / "pytorch_model.bin")
    error = error_of(single)
    assert "pickled" in str(error.found)
    assert "save_pretrained" in str(error.hint)


def test_no_weights_at_all(single: Path) -> None:
    (single / SINGLE_FILE).unlink()
    assert "holds no weights" in error_of(single).what


def test_weights_that_another_tool_quantised(single: Path) -> None:
    change_json(single / "config.json", quantization_config={"quant_method": "awq"})
    error = error_of(single)
    assert "another tool" in error.what
    assert error.found == "awq"


def test_an_unknown_model_type(single: Path) -> None:
    change_json(single / "config.json", model_type="mamba9")
    error = error_of(single)
    assert isinstance(error, ConfigError)
    assert "model_type" in error.what
    assert "deepseek_v3" in str(error.allowed)


def test_an_unknown_key_is_named(single: Path) -> None:
    change_json(single / "config.json", attention_sinks=4)
    error = error_of(single)
    assert isinstance(error, ConfigError)
    assert error.found == "attention_sinks"


def test_no_folder(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "nothing").what


# Writing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_to_do(code: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error, writing(tmp_path):
        raise OSError(code, os.strerror(code))
    assert error.value.found == os.strerror(code)
    assert "free some space" in str(error.value.hint)


def test_a_failed_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = ShardWriter(tmp_path)
    writer.add("a", torch.zeros(4))
    monkeypatch.setattr(shards_module.os, "fsync", full)
    with pytest.raises(OutputError):
        writer.finish()
    assert not list(tmp_path.glob("model-*"))
    ShardWriter(tmp_path)
    assert os.listdir(tmp_path) == []
