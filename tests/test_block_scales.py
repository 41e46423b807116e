"""Checkpoints in float8 with scales of blocks, against transformers and an element at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import random_model, relative_error, save_checkpoint, transformers_logits
from support.sources import random_source
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from mla_deploy.block_scales import METHOD, SCALE_SUFFIX, read_quantization, scaled, scales_shape
from mla_deploy.checkpoint import SINGLE_FILE, Checkpoint
from mla_deploy.errors import CheckpointError, ConfigError, MlaError
from mla_deploy.model import forward_window, load_model
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint

BLOCK = (16, 16)
SIZES = {"hidden_size": 128, "q_lora_rank": 96, "v_head_dim": 32}
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def config_of(block: object = BLOCK) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": METHOD,
        "weight_block_size": list(block) if isinstance(block, tuple) else block,
    }


def to_float8(
    folder: Path, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.float32
) -> None:
    """Put the matrices of a saved model into float8, as DeepSeek publishes its own."""
    stored = {}
    for name, matrix in load_file(folder / SINGLE_FILE).items():
        stored[name] = matrix
        if matrix.ndim == 2 and "_proj" in name:
            scales = torch.ones(scales_shape(matrix.shape, block))
            for row, scales_of_row in zip(matrix.split(block[0]), scales, strict=True):
                for column, part in enumerate(row.split(block[1], dim=1)):
                    scales_of_row[column] = part.abs().max() / 448
            scales = scales.to(dtype)
            stored[name + SCALE_SUFFIX] = scales
            stored[name] = (matrix / scaled(torch.ones_like(matrix), scales, block)).to(
                torch.float8_e4m3fn
            )
    save_file(stored, folder / SINGLE_FILE, {"format": "pt"})
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "quantization_config": config_of(block)}))


@pytest.fixture
def float8(tmp_path: Path) -> Path:
    """A mixture of experts of DeepSeek-V3's kind in float8."""
    model = random_model("deepseek_v3", moe=True, yarn=True, q_lora=True, **SIZES)
    folder = save_checkpoint(model, tmp_path / "float8", None)
    to_float8(folder)
    return folder


@pytest.mark.parametrize("shape", [(32, 32), (33, 40), (5, 3), (16, 50), (1, 16)])
def test_an_element_is_its_code_times_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    block = (16, 20)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(scales_shape(shape, block)) + 0.5
    found = scaled(codes, scales, block)
    for row in range(shape[0]):
        for column in range(shape[1]):
            scale = scales[row // block[0], column // block[1]]
            assert found[row, column] == codes[row, column].float() * scale


def test_logits_are_those_of_transformers(float8: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(
        float8,
        quantization_config=FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    ids = torch.randint(0, 192, (50,))
    found = forward_window(load_model(float8), Checkpoint(float8).config, ids.unsqueeze(0))[0]
    assert relative_error(found, transformers_logits(oracle, ids)) < 2e-5


@pytest.mark.parametrize("weights", ["int4", "none"])
def test_quantize_reads_what_the_codes_stand_for(
    weights: str, float8: Path, tmp_path: Path
) -> None:
    source = Checkpoint(float8)
    plain = {name: source.read(name) for name in source.tensors}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / SINGLE_FILE, {"format": "pt"})
    raw = json.loads((float8 / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(raw))
    options = QuantizeOptions(weights=weights)
    found = quantize_checkpoint(float8, tmp_path / "found", options)
    expected = quantize_checkpoint(tmp_path / "plain", tmp_path / "expected", options)
    assert found.source_bytes < 0.5 * expected.source_bytes
    assert found.output_bytes == expected.output_bytes
    for file in sorted((tmp_path / "expected").iterdir()):
        assert (tmp_path / "found" / file.name).read_bytes() == file.read_bytes(), file.name


def test_blocks_that_are_cut_off(tmp_path: Path) -> None:
    """As kv_a_proj_with_mqa of DeepSeek-V3, whose 576 rows have five scales; scales in bfloat16."""
    model = random_model("deepseek_v2", moe=False, yarn=False, q_lora=False)
    folder = save_checkpoint(model, tmp_path / "float8", None)
    original = load_file(folder / SINGLE_FILE)
    to_float8(folder, (128, 36), torch.bfloat16)
    checkpoint = Checkpoint(folder)
    assert checkpoint.scales[KV_A].shape == (1, 3)
    assert checkpoint.info(KV_A).dtype == "F32"
    assert checkpoint.info(KV_A).bytes == original[KV_A].numel() + 3 * 2
    for name, matrix in original.items():
        error = (checkpoint.read(name) - matrix).abs().max()
        assert error <= (2**-4 * matrix.abs().max() if name in checkpoint.scales else 0)


def test_a_source_of_conversion(tmp_path: Path) -> None:
    folder = save_checkpoint(random_source("llama").bfloat16(), tmp_path / "float8", None)
    original = load_file(folder / SINGLE_FILE)
    to_float8(folder)
    source = Source(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    assert source.plain(name).dtype is source.dtype is torch.bfloat16
    assert relative_error(source.plain(name), original[name]) < 0.1
    assert source.plain_bytes == sum(tensor.nbytes for tensor in original.values())


Change = Callable[[dict[str, torch.Tensor]], object]
BROKEN: dict[str, tuple[Change, str]] = {
    "no scale": (lambda t: t.pop(KV_A + SCALE_SUFFIX), "type that is not supported"),
    "no matrix": (lambda t: t.pop(KV_A), "no scale of a float8 matrix"),
    "not float8": (lambda t: t.update({KV_A: t[KV_A].float()}), "no scale of a float8 matrix"),
    "other blocks": (
        lambda t: t.update({KV_A + SCALE_SUFFIX: t[KV_A + SCALE_SUFFIX][:-1].clone()}),
        "cannot be used",
    ),
    "whole numbers": (
        lambda t: t.update({KV_A + SCALE_SUFFIX: t[KV_A + SCALE_SUFFIX].to(torch.uint8)}),
        "cannot be used",
    ),
    "not a number": (lambda t: t[KV_A + SCALE_SUFFIX].fill_(math.nan), "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(case: str, float8: Path) -> None:
    change, message = BROKEN[case]
    tensors = load_file(float8 / SINGLE_FILE)
    change(tensors)
    save_file(tensors, float8 / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(float8)
    assert KV_A in error.value.what


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_block_size": None}, {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]}, {"weight_block_size": [True, 128]},
        {"fmt": "e5m2"}, {"activation_scheme": "static"}, {"quant_method": None},
        {"block_structure": "2d"},
    ],
)  # fmt: skip
def test_a_form_of_float8_that_is_not_known(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        read_quantization({**config_of(), **changes}, "config.json")
    assert "quantization_config" in error.value.what


@pytest.mark.parametrize("value", ["fp8", [], 8])
def test_a_quantization_config_that_is_no_object(value: object) -> None:
    with pytest.raises(MlaError, match="must be an object"):
        read_quantization(value, "config.json")
