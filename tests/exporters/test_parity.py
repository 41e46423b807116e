"""Exported graphs, run by onnxruntime alone, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.graph_runner import GraphRunner
from support.models import (
    LONGROPE,
    VOCAB,
    random_model,
    relative_error,
    save_checkpoint,
    transformers_logits,
)
from transformers import PreTrainedModel

from mla_deploy.bundle import Bundle
from mla_deploy.exporters.onnx import export_onnx

PROMPTS = (5, 70, 33)
STEPS = 64


@pytest.mark.parametrize("q_lora", [True, False], ids=["q_lora", "no_q_lora"])
@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "no_yarn"])
@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_prefill_and_decode_equal_transformers(
    tmp_path: Path, tiny_mla: Path, family: str, moe: bool, yarn: bool, q_lora: bool
) -> None:
    assert_graph_equals(random_model(family, moe=moe, yarn=yarn, q_lora=q_lora), tmp_path, tiny_mla)


def test_minicpm3_with_longrope_equals_transformers(tmp_path: Path, tiny_mla: Path) -> None:
    """Scaled embeddings and logits, rotary rows as halves."""
    theirs = random_model(
        "minicpm3", moe=False, yarn=False, q_lora=True, rope_parameters=dict(LONGROPE)
    )
    assert_graph_equals(theirs, tmp_path, tiny_mla)


def assert_graph_equals(theirs: PreTrainedModel, tmp_path: Path, tiny_mla: Path) -> None:
    """Three prompts of unequal length in one batch, then 64 steps; and one prompt alone."""
    source = save_checkpoint(theirs, tmp_path / "source", tiny_mla)
    bundle = Bundle.open(export_onnx(source, tmp_path / "bundle").bundle)
    texts = [torch.randint(VOCAB, (prompt + STEPS,)) for prompt in PROMPTS]
    expected = [transformers_logits(theirs, text) for text in texts]

    runner = GraphRunner(bundle, len(texts), max(PROMPTS) + STEPS)
    pieces = [
        [logits] for logits in runner.append([t[:p] for t, p in zip(texts, PROMPTS, strict=True)])
    ]
    for step in range(STEPS):
        for kept, logits in zip(
            pieces,
            runner.append([t[p + step, None] for t, p in zip(texts, PROMPTS, strict=True)]),
            strict=True,
        ):
            kept.append(logits)
    for kept, logits in zip(pieces, expected, strict=True):
        assert relative_error(torch.cat(kept), logits) < 1e-3

    alone = GraphRunner(bundle, 1, len(texts[1]))
    assert relative_error(alone.append([texts[1]])[0], expected[1]) < 1e-3
