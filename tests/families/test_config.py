"""Reading config.json: real files, unknown keys, values out of range."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_deploy.errors import ConfigError
from mla_deploy.families import load_config
from mla_deploy.model import count_parameters
from mla_deploy.rope import softmax_scale

REAL = {
    "deepseek-ai--DeepSeek-V2-Lite": 15.71e9,
    "deepseek-ai--DeepSeek-V3": 671.0e9,
    "deepseek-ai--DeepSeek-R1": 671.0e9,
    "moonshotai--Kimi-K2-Instruct": 1026.4e9,
    "zai-org--GLM-4.7-Flash": 29.94e9,
}


MINICPM3_4B = {
    "architectures": ["MiniCPM3ForCausalLM"],
    "model_type": "minicpm3",
    "bos_token_id": 1,
    "eos_token_id": [2, 73440],
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.1,
    "intermediate_size": 6400,
    "max_position_embeddings": 32768,
    "num_attention_heads": 40,
    "num_hidden_layers": 62,
    "num_key_value_heads": 40,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "type": "longrope",
        "long_factor": [1.0 + pair for pair in range(16)],
        "short_factor": [1.0 + pair for pair in range(16)],
        "original_max_position_embeddings": 32768,
    },
    "vocab_size": 73448,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
}
"""The keys of openbmb/MiniCPM3-4B; its factors are equal in both lists too."""
LAYER = {
    "cache_format": "int4", "latent_rotation": None, "balanced": False, "linear": None,
    "experts": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def longrope(trained: int = 4096, **changes: Any) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": trained}
    return scaling | factors | changes


def changed(tiny_mla: Path, tmp_path: Path, **changes: Any) -> Path:
    raw = json.loads((tiny_mla / "config.json").read_text()) | changes
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return file


def test_minicpm3_has_the_published_size_and_the_defaults_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINICPM3_4B))
    config = load_config(tmp_path)
    assert count_parameters(config) == pytest.approx(4.07e9, rel=1e-3)
    assert (config.v_head_dim, config.eos_token_ids) == (64, (2, 73440))
    assert config.rope.longrope is not None
    assert config.rope.longrope.attention_factor == 1.0  # trained at its full context


def test_glm_flash_is_read_with_all_keys_that_it_is_published_with(
    shared: Path, tmp_path: Path
) -> None:
    """The copy in ../shared is shortened; these are the rest."""
    folder = shared / "data" / "configs"
    raw = json.loads((folder / "zai-org--GLM-4.7-Flash_config.json").read_text())
    raw |= {
        "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
        "eos_token_id": [154820, 154827, 154829], "hidden_act": "silu", "n_group": 1,
        "norm_topk_prob": True, "num_nextn_predict_layers": 1, "pad_token_id": 154820,
        "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "topk_group": 1, "topk_method": "noaux_tc",
        "transformers_version": "5.0.0rc0",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_config(tmp_path)
    assert count_parameters(config) == pytest.approx(29.94e9, rel=1e-3)
    assert (config.rope.theta, config.eos_token_ids[0]) == (1e6, 154820)
    nested = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_parameters": nested}))
    assert load_config(tmp_path) == config


def test_a_key_that_is_null_is_not_there(tiny_mla: Path, tmp_path: Path) -> None:
    assert load_config(changed(tiny_mla, tmp_path, sliding_window=None)) == load_config(tiny_mla)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_to_be_converted_is_sent_to_build(
    tiny_mla: Path, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(ConfigError, match="not latent yet") as caught:
        load_config(changed(tiny_mla, tmp_path, model_type=kind))
    assert "--target-ratio" in str(caught.value.hint)


@pytest.mark.parametrize("name", REAL)
def test_real_configs_have_the_published_size(shared: Path, name: str) -> None:
    config = load_config(shared / "data" / "configs" / f"{name}_config.json")
    assert count_parameters(config) == pytest.approx(REAL[name], rel=1e-3)


def test_yarn_scales_the_softmax(shared: Path) -> None:
    config = load_config(shared / "data/configs/deepseek-ai--DeepSeek-V2-Lite_config.json")
    mscale = 0.1 * 0.707 * 3.6888794541139363 + 1  # ln 40
    assert softmax_scale(config) == pytest.approx(192**-0.5 * mscale**2)


def test_an_unknown_key_is_named(tiny_mla: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not known") as caught:
        load_config(changed(tiny_mla, tmp_path, logit_softcapping=30.0))
    assert caught.value.found == "logit_softcapping"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is not known"),
        ({"model_type": 5}, "model_type is not known"),
        ({"kv_lora_rank": ...}, "kv_lora_rank is missing"),
        ({"kv_lora_rank": "128"}, "kv_lora_rank has the wrong type"),
        ({"kv_lora_rank": True}, "kv_lora_rank has the wrong type"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is out of range"),
        ({"q_lora_rank": -1}, "q_lora_rank is out of range"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is out of range"),
        ({"moe_layer_freq": 0}, "moe_layer_freq is out of range"),
        ({"moe_intermediate_size": -4}, "moe_intermediate_size is out of range"),
        ({"n_routed_experts": 1 << 20}, "n_routed_experts is out of range"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is out of range"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is out of range"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is out of range"),
        ({"bos_token_id": -1}, "bos_token_id holds what is no token id"),
        ({"bos_token_id": [1]}, "bos_token_id holds what is no token id"),
        ({"eos_token_id": "a"}, "eos_token_id holds what is no token id"),
        ({"eos_token_id": [1, 2**31]}, "eos_token_id holds what is no token id"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object"),
        ({"qk_rope_head_dim": 31}, "qk_rope_head_dim is odd"),
        ({"num_key_value_heads": 2}, "num_key_value_heads has a value that is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act has a value that is not supported"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok does not fit"),
        ({"n_group": 3}, "do not divide into groups"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope scaling is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "embeddings is missing"),
        ({"rope_parameters": YARN | {"factor": 0}}, "factor is out of range"),
        ({"rope_parameters": YARN | {"beta_slow": -1.0}}, "beta_slow is out of range"),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 1}}, "too small"),
        ({"rope_parameters": longrope(4095)}, "other factors from 4095 tokens on"),
        ({"rope_parameters": longrope(long_factor=[1.0] * 15)}, "long_factor is not such a list"),
        ({"rope_parameters": longrope(short_factor=[0.0] * 16)}, "short_factor is not such a list"),
        ({"rope_parameters": longrope(short_factor=[True] * 16)}, "short_factor is not such"),
        ({"rope_parameters": longrope(long_factor=[float("inf")] * 16)}, "long_factor is not such"),
        ({"rope_parameters": longrope(short_factor=2.0)}, "short_factor has the wrong type"),
        ({"rope_parameters": longrope(attention_factor=float("nan"))}, "attention_factor is out"),
        ({"rope_parameters": longrope(beta_fast=32)}, "rope scaling has keys"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "truncate": False}}, "rope scaling has keys"),
        ({"rope_parameters": {"head_dim": 32}}, "rope scaling has keys"),
        ({"rope_parameters": {"rope_type": None}}, "rope scaling is not supported"),
        ({"rope_parameters": "yarn"}, "rope scaling has the wrong type"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope scaling is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor has a value"),
        ({"rope_parameters": YARN | {"rope_theta": 1}}, "rope_theta is out of range"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is out of range"),
        ({"mla_deploy": {"version": 99}}, "recipe is of another version"),
        ({"mla_deploy": {"version": 1, "colour": "red"}}, "recipe cannot be read"),
        ({"mla_deploy": {"version": 1, "linear": {"bits": 5, "group": 64}}}, "this bits"),
        ({"mla_deploy": {"version": 1, "linear": {"bits": "4", "group": 64}}}, "cannot be read"),
        ({"mla_deploy": {"version": 1, "balanced": 1}}, "recipe cannot be read"),
        ({"mla_deploy": {"version": 1, "layers": [LAYER]}}, "recipe is of another model"),
        ({"mla_deploy": {"version": 1, "layers": [{}]}}, "recipe cannot be read"),
        ({"mla_deploy": [1]}, "recipe must be an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_value_is_reported(
    tiny_mla: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(changed(tiny_mla, tmp_path, **changes))


VALUES = (
    None, True, -1, 0, 1, 2**31, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "a", [], [1],
    {}, {"type": "yarn"}, {"quant_method": 5},
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(MINICPM3_4B)), value=st.sampled_from(VALUES))
def test_whatever_a_value_is_it_is_read_or_reported(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MINICPM3_4B, key: value}))
    with suppress(ConfigError):
        assert count_parameters(load_config(tmp_path)) > 0


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_same_with_experts(data: st.DataObject, tiny_mla: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_mla / "config.json").read_text())
    key = data.draw(st.sampled_from([*sorted(raw), "quantization_config", "moe_layer_freq"]))
    value = data.draw(st.sampled_from(VALUES))
    with suppress(ConfigError):
        assert count_parameters(load_config(changed(tiny_mla, tmp_path, **{key: value}))) > 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "\xff", '{"vocab_size": ' + "1" * 5000], ids=range(6)
)
def test_a_broken_file_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_config(tmp_path)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)
