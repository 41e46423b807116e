"""`mla-deploy inspect` on a config, a checkpoint, a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Invoke = Callable[..., Result]
ValuesOf = Callable[..., dict[str, Any]]

# The published geometry of DeepSeek-V2-Lite.
V2_LITE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 6,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}


DEFAULT = ["int8", "int4", "int4", "int4"]
"""The cache of tiny-mla's layers, where nothing is asked for."""


@pytest.fixture
def v2_lite(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(V2_LITE))
    return file


def test_a_config_alone_tells_parameters_and_cache(v2_lite: Path, values_of: ValuesOf) -> None:
    found = values_of("inspect", v2_lite)
    assert found["kind"] == "config"
    assert found["parameters"] == 15_706_484_224
    per_layer = found["kv_bytes_per_token_per_layer"]
    assert per_layer.items() >= {"int4": 360, "int8": 600, "fp16": 1152, "fp32": 2304}.items()
    assert found["kv_bytes_per_token"]["int4"] == 360 * 27
    # What `quantize` makes: int8 in the first layer.
    assert found["kv_bytes_per_token"]["int4+int8"] == 360 * 26 + 600
    assert found["kv_bytes_per_token"]["int4-g32+int8"] == 392 * 26 + 600
    assert per_layer["int4+int8"] == pytest.approx((360 * 26 + 600) / 27)
    # A key of 192 and a value of 128 for each of 16 heads, 2 bytes each.
    assert found["mha_fp16_bytes_per_token_per_layer"] == 10240
    assert found["times_smaller_than_mha_fp16"]["int4"] == pytest.approx(10240 / 360)
    weights = found["weight_bytes"]
    assert weights["fp16"] == 2 * 15_706_484_224
    assert 0.25 < weights["int4"] / weights["fp16"] < 0.31 < 0.5 < weights["int8"] / weights["fp16"]


def test_the_folder_of_a_config_is_as_good(v2_lite: Path, values_of: ValuesOf) -> None:
    assert values_of("inspect", v2_lite.parent)["parameters"] == 15_706_484_224


def test_memory_shows_what_context_fits(v2_lite: Path, values_of: ValuesOf) -> None:
    found = values_of("inspect", v2_lite, "--memory", "16GB")
    fits = found["context_that_fits"]
    assert found["memory_bytes"] == 16 * 10**9
    left = 16 * 10**9 - found["weight_bytes"]["int4"]
    assert fits["int4"]["int4"] == left // 9720 // 64 * 64
    assert fits["int4"]["fp16"] == 0
    assert fits["int4"]["int4"] > fits["int8"]["int4"] > fits["fp16"]["int4"] > 0


def test_the_text_shows_the_same_figures(v2_lite: Path, invoke: Invoke) -> None:
    text = invoke("inspect", v2_lite, "--memory", "8GB").stdout
    assert "15,706,484,224 (15.7 B)" in text
    assert "latent, int4" in text
    assert "28.4x" in text
    default = next(line for line in text.splitlines() if "int4 (first layer int8)" in line)
    assert default.split()[-3:] == ["368.9", "9,960", "27.8x"]
    assert "6 of 64 + 2 shared" in text


def test_a_latent_that_int4_cannot_hold_says_so(v2_lite: Path, invoke: Invoke) -> None:
    v2_lite.write_text(json.dumps(V2_LITE | {"kv_lora_rank": 100, "qk_rope_head_dim": 64}))
    result = invoke("inspect", v2_lite)
    assert result.exit_code == 0
    assert "does not fit this latent" in result.stdout
    assert "first layer" not in result.stdout


def test_a_checkpoint_is_described(tiny_mla: Path, values_of: ValuesOf) -> None:
    found = values_of("inspect", tiny_mla, "--verify")
    assert (found["kind"], found["parameters"], found["verified"]) == (
        "checkpoint",
        5_235_864,
        True,
    )
    assert found["cache_format"] is None


def test_a_quantised_checkpoint_tells_its_recipe(quantized: Path, values_of: ValuesOf) -> None:
    found = values_of("inspect", quantized)
    assert found["cache_format"] == "int4+int8"
    assert found["recipe"]["cache_format"] == "int4"
    assert [layer["cache_format"] for layer in found["recipe"]["layers"]] == DEFAULT
    assert found["kv_bytes_per_token"]["int4+int8"] == 168 + 3 * 108
    assert found["weight_bytes"]["as stored"] == found["weight_bytes"]["int4"]
    stored = sum(file.stat().st_size for file in quantized.glob("*.safetensors"))
    # The output matrix of tied embeddings is one tensor in the file.
    assert found["weight_bytes"]["as stored"] == pytest.approx(stored, rel=0.02)


def test_a_bundle_lists_its_files(bundle: Path, values_of: ValuesOf, invoke: Invoke) -> None:
    found = values_of("inspect", bundle, "--verify")
    assert (found["kind"], found["parameters"], found["verified"]) == ("bundle", 5_235_864, True)
    assert found["kv_bytes_per_token_per_layer"] == {"int4+int8": (168 + 3 * 108) / 4}
    assert "int4 (first layer int8)" in invoke("inspect", bundle).stdout
    sizes = {entry["path"]: entry["bytes"] for entry in found["files"]}
    on_disk = {file.name: file.stat().st_size for file in bundle.iterdir()}
    assert sizes == {name: size for name, size in on_disk.items() if name != "manifest.json"}
    assert invoke("inspect", bundle / "manifest.json").exit_code == 0


def test_verify_finds_a_changed_byte(bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    result = invoke("inspect", copy, "--verify")
    assert result.exit_code == 2
    assert "model.onnx.data is damaged" in result.stderr


def test_verify_finds_a_missing_tensor(tiny_mla: Path, tmp_path: Path, invoke: Invoke) -> None:
    config = json.loads((tiny_mla / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    shutil.copy(tiny_mla / "model.safetensors", tmp_path)
    assert invoke("inspect", tmp_path).exit_code == 0
    result = invoke("inspect", tmp_path, "--verify")
    assert result.exit_code == 2
    assert "lacks the tensor model.layers.4." in result.stderr
