"""Reference modules against transformers' classes of the same name, on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import (
    LONGROPE,
    PLAIN_ROPE,
    VOCAB,
    YARN,
    random_model,
    relative_error,
    save_checkpoint,
    transformers_logits,
)

from mla_deploy.families import load_config
from mla_deploy.model import count_parameters, forward_window, load_model, set_attention_mode

FAMILIES = ["deepseek_v2", "deepseek_v3"]
SHORT_ROPE = LONGROPE | {"original_max_position_embeddings": 256, "long_factor": [9.0] * 8}
"""No position of the context needs the long factors."""


@pytest.mark.parametrize("q_lora", [True, False], ids=["q_lora", "no_q_lora"])
@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "no_yarn"])
@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_modes_equal_transformers(
    tmp_path: Path, family: str, moe: bool, yarn: bool, q_lora: bool
) -> None:
    theirs = random_model(family, moe=moe, yarn=yarn, q_lora=q_lora)
    save_checkpoint(theirs, tmp_path, None)
    config, ours = load_config(tmp_path), load_model(tmp_path)
    ids = torch.randint(VOCAB, (2, 150))
    expected = torch.stack([transformers_logits(theirs, one) for one in ids])
    logits = {}
    for mode in ("absorbed", "expanded"):
        set_attention_mode(ours, mode)
        logits[mode] = forward_window(ours, config, ids)
        assert relative_error(logits[mode], expected) < 1e-4
    assert relative_error(logits["absorbed"], logits["expanded"]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"n_shared_experts": 2},
        {"n_group": 1, "topk_group": 1},
        {"topk_group": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_equal_transformers(
    tmp_path: Path, family: str, changes: dict[str, object]
) -> None:
    for q_lora in (True, False):
        theirs = random_model(family, moe=True, yarn=False, q_lora=q_lora, **changes)
        folder = save_checkpoint(theirs, tmp_path / str(q_lora), None)
        ids = torch.randint(VOCAB, (1, 40))
        found = forward_window(load_model(folder), load_config(folder), ids)[0]
        assert relative_error(found, transformers_logits(theirs, ids[0])) < 1e-4


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite", "youtu"])
def test_rotary_channels_stored_as_halves_equal_transformers(tmp_path: Path, family: str) -> None:
    changes = {"rope_interleave": False, "attention_bias": family != "youtu"}
    for q_lora in (True, False):
        moe = family == "glm4_moe_lite"
        theirs = random_model(family, moe=moe, yarn=True, q_lora=q_lora, **changes)
        folder = save_checkpoint(theirs, tmp_path / str(q_lora), None)
        ids = torch.randint(VOCAB, (1, 100))
        found = forward_window(load_model(folder), load_config(folder), ids)[0]
        assert relative_error(found, transformers_logits(theirs, ids[0])) < 1e-4


@pytest.mark.parametrize("q_lora", [True, False], ids=["q_lora", "no_q_lora"])
@pytest.mark.parametrize(
    "rope",
    [PLAIN_ROPE, YARN, LONGROPE, SHORT_ROPE],
    ids=["default", "yarn", "longrope", "longrope-short"],
)
def test_minicpm3_equals_transformers(tmp_path: Path, rope: dict[str, Any], q_lora: bool) -> None:
    changes = {"scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 32, "rms_norm_eps": 1e-3}
    theirs = random_model(
        "minicpm3", moe=False, yarn=False, q_lora=q_lora, rope_parameters=dict(rope), **changes
    )
    save_checkpoint(theirs, tmp_path, None)
    config, ours = load_config(tmp_path), load_model(tmp_path)
    ids = torch.randint(VOCAB, (2, 150))
    expected = torch.stack([transformers_logits(theirs, one) for one in ids])
    for mode in ("absorbed", "expanded"):
        set_attention_mode(ours, mode)
        assert relative_error(forward_window(ours, config, ids), expected) < 1e-4


@pytest.mark.parametrize(("family", "moe"), [("glm4_moe_lite", True), ("youtu", False)])
def test_families_like_deepseek_v3_equal_transformers(
    tmp_path: Path, family: str, moe: bool
) -> None:
    theirs = random_model(family, moe=moe, yarn=True, q_lora=True)
    save_checkpoint(theirs, tmp_path, None)
    ids = torch.randint(VOCAB, (1, 100))
    found = forward_window(load_model(tmp_path), load_config(tmp_path), ids)[0]
    assert relative_error(found, transformers_logits(theirs, ids[0])) < 1e-4


def test_greedy_routing_equals_transformers(tmp_path: Path) -> None:
    theirs = random_model("deepseek_v2", moe=True, yarn=True, q_lora=False, topk_method="greedy")
    save_checkpoint(theirs, tmp_path, None)
    ids = torch.randint(VOCAB, (1, 40))
    found = forward_window(load_model(tmp_path), load_config(tmp_path), ids)[0]
    assert relative_error(found, transformers_logits(theirs, ids[0])) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_transformers_does(tmp_path: Path, family: str) -> None:
    theirs = random_model(family, moe=True, yarn=False, q_lora=True)
    save_checkpoint(theirs, tmp_path, None)
    biases = sum(b.numel() for n, b in theirs.named_buffers() if "correction_bias" in n)
    expected = sum(p.numel() for p in theirs.parameters()) + biases
    assert count_parameters(load_config(tmp_path)) == expected


def test_the_shipped_model_equals_transformers(tiny_mla: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_mla, dtype=torch.float32).eval()
    ids = torch.randint(4096, (1, 200))
    found = forward_window(load_model(tiny_mla), load_config(tiny_mla), ids)[0]
    assert relative_error(found, transformers_logits(theirs, ids[0])) < 1e-4
