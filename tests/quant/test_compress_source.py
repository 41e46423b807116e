"""The reader and the layers of ordinary models, against transformers."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.models import VOCAB, relative_error, save_checkpoint, transformers_logits
from support.sources import CLASSES, ROPES, random_source

from mla_deploy.checkpoint import SINGLE_FILE
from mla_deploy.errors import CheckpointError, ConfigError
from mla_deploy.quant.compress.calibration import generate
from mla_deploy.quant.compress.layer import load_layer, rms_norm
from mla_deploy.quant.compress.source import Source, read_source_config
from mla_deploy.quant.compress.streams import SourceLayer

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, **ROPES["llama3"]}
RAW: dict[str, dict[str, Any]] = {}


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """By our layers, one at a time. Shapes: ids [S] to [S, vocab]."""
    source = Source(folder)
    config = source.config
    h = source.read("model.embed_tokens.weight")[ids].unsqueeze(0)
    for index in range(config.num_hidden_layers):
        layer = SourceLayer(config, index, load_layer(source, index))
        h = layer.finish(h, layer.attend(*layer.project(h)))
    tied = config.tie_word_embeddings
    head = source.read("model.embed_tokens.weight" if tied else "lm_head.weight")
    norm = source.read("model.norm.weight")
    return (rms_norm(h, norm, config.rms_norm_eps) @ head.T)[0]


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_families_equal_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    theirs = random_source(family, tie_word_embeddings=tied)
    save_checkpoint(theirs, tmp_path, None)
    ids = torch.randint(VOCAB, (90,))
    assert relative_error(logits_of(tmp_path, ids), transformers_logits(theirs, ids)) < 1e-5


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scalings_equal_transformers(tmp_path: Path, rope: str) -> None:
    theirs = random_source("llama", rope)
    save_checkpoint(theirs, tmp_path, None)
    ids = torch.randint(VOCAB, (200,))
    assert relative_error(logits_of(tmp_path, ids), transformers_logits(theirs, ids)) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"num_key_value_heads": 8}, {"num_key_value_heads": 1}],
    ids=["bias", "mha", "mqa"],
)
def test_variants_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = random_source("llama", **changes)
    save_checkpoint(theirs, tmp_path, None)
    ids = torch.randint(VOCAB, (90,))
    assert relative_error(logits_of(tmp_path, ids), transformers_logits(theirs, ids)) < 1e-5


def test_yarn_with_all_its_keys_equals_transformers(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 3.0,
        "original_max_position_embeddings": 48,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    }
    theirs = random_source("llama", rope_parameters=rope)
    save_checkpoint(theirs, tmp_path, None)
    ids = torch.randint(VOCAB, (140,))
    assert relative_error(logits_of(tmp_path, ids), transformers_logits(theirs, ids)) < 1e-4


@pytest.mark.parametrize(
    ("name", "layers", "groups"),
    [
        ("meta-llama--Meta-Llama-3.1-8B_config.json", 32, 8),
        ("Llama-3.2-1B-Instruct.config.json", 16, 8),
        ("Qwen2.5-0.5B-Instruct.config.json", 24, 2),
        ("Qwen--Qwen3-8B_config.json", 36, 8),
    ],
)
def test_published_configs_are_read(shared: Path, name: str, layers: int, groups: int) -> None:
    raw = json.loads((shared / "data" / "configs" / name).read_text())
    config = read_source_config(raw, name)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (layers, groups)
    assert config.qk_norm == (config.model_type == "qwen3")


def test_the_model_writes_what_it_thinks_likely(tmp_path: Path) -> None:
    """Its own text must be far less surprising to it than random tokens."""
    theirs = random_source("llama", num_key_value_heads=2)
    with torch.no_grad():
        theirs.lm_head.weight *= 4
    save_checkpoint(theirs, tmp_path, None)
    written = generate(Source(tmp_path), 4, 40, seed=3)
    assert written.shape == (4, 40)
    assert torch.equal(written, generate(Source(tmp_path), 4, 40, seed=3))

    def surprise(ids: torch.Tensor) -> float:
        logits = torch.stack([transformers_logits(theirs, one) for one in ids])
        chosen = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2))
        return -float(chosen.mean())

    assert surprise(written) < surprise(torch.randint(VOCAB, (4, 40))) - 1


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("mistral", {"sliding_window": 64}, "window 64 in the layers 0, 1"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
            "window 32 in the layers 1",
        ),
    ],
)
def test_sliding_windows_are_refused_by_layer(
    tmp_path: Path, family: str, changes: dict[str, Any], found: str
) -> None:
    save_checkpoint(random_source(family, **changes), tmp_path, None)
    with pytest.raises(ConfigError) as caught:
        Source(tmp_path)
    assert "sliding window" in str(caught.value)
    assert found in str(caught.value)


def test_smollm2_is_read_with_all_keys_that_it_is_published_with() -> None:
    raw = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
    }  # fmt: skip
    config = read_source_config(raw, "config.json")
    assert (config.head_dim, config.rope_theta) == (64, 100000)


def test_smollm3_is_read_with_what_transformers_fills_in(tmp_path: Path) -> None:
    theirs = random_source(
        "smollm3", num_hidden_layers=8, no_rope_layers=None, no_rope_layer_interval=3
    )
    save_checkpoint(theirs, tmp_path, None)
    raw = json.loads((tmp_path / "config.json").read_text())
    flags = raw.pop("no_rope_layers")
    expected = frozenset(layer for layer, flag in enumerate(flags) if not flag)
    assert expected == {2, 5}
    raw["rope_parameters"] = None
    config = read_source_config(raw, "config.json")
    assert config.layers_without_rope == expected
    assert config.rope_theta == 2e6


VALUES = (None, True, -1, 0, 1, 10**400, 0.5, float("nan"), "", "a", [], [1], {}, {"type": "yarn"})


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_a_value_is_it_is_read_or_reported(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(CLASSES)))
    raw = RAW.setdefault(family, random_source(family).config.to_dict())
    key = data.draw(st.sampled_from([*sorted(raw), "rope_scaling", "rope_theta", "layer_types"]))
    with suppress(ConfigError, CheckpointError):
        read_source_config({**raw, key: data.draw(st.sampled_from(VALUES))}, "config.json")


def test_tensors_that_the_model_does_not_use_are_refused(tmp_path: Path) -> None:
    save_checkpoint(random_source("llama"), tmp_path, None)
    tensors = load_file(tmp_path / SINGLE_FILE)
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | derived, tmp_path / SINGLE_FILE)
    Source(tmp_path)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}
    save_file(tensors | bias, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="does not use") as caught:
        Source(tmp_path)
    assert "q_proj.bias" in str(caught.value.found)


def test_a_model_that_is_mla_already_is_refused(tiny_mla: Path) -> None:
    with pytest.raises(CheckpointError, match="latent attention already"):
        Source(tiny_mla)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "cannot be converted"),
        ({"surprising_key": 3}, "surprising_key"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope scaling is not supported"),
        ({"rope_parameters": "yarn"}, "wrong type"),
        ({"rope_parameters": None, "rope_scaling": [1]}, "wrong type"),
        ({"rope_parameters": None, "rope_theta": "big"}, "rope_theta has the wrong type"),
        ({"rope_parameters": {"rope_theta": [1]}}, "rope_theta has the wrong type"),
        ({"rope_parameters": {"rope_theta": 1}}, "rope_theta is out of range"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is out of range"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "wrong way round"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": 5}, "layer_types has the wrong type"),
        ({"model_type": ["llama"]}, "cannot be converted"),
        ({"num_key_value_heads": 3}, "3 key heads"),
    ],
)
def test_configs_that_cannot_be_converted_say_why(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_checkpoint(random_source("llama"), tmp_path, None)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(ConfigError) as caught:
        read_source_config(raw, "config.json")
    assert message in str(caught.value)
