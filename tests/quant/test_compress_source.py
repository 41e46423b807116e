"""The reader and the layers of ordinary models, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import VOCAB, relative_error, save_checkpoint, transformers_logits
from support.sources import CLASSES, ROPES, random_source

from mla_deploy.errors import CheckpointError, ConfigError
from mla_deploy.quant.compress.calibration import generate
from mla_deploy.quant.compress.layer import load_layer, rms_norm
from mla_deploy.quant.compress.source import Source, read_source_config
from mla_deploy.quant.compress.streams import SourceLayer


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
