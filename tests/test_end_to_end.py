"""The main job: checkpoint, quantize, export, run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import random_model, save_checkpoint

from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.runtime import GenerationOptions, load

PROMPT = "The old man said that"


def bundle_of(source: Path, folder: Path, options: QuantizeOptions) -> Path:
    quantize_checkpoint(source, folder / "small", options)
    return export_onnx(folder / "small", folder / "bundle").bundle


@pytest.mark.parametrize("kernels", ["stock", "auto"])
def test_greedy_tokens_are_those_of_transformers(
    tiny_mla: Path, tmp_path: Path, kernels: str
) -> None:
    from transformers import AutoModelForCausalLM

    bundle = bundle_of(tiny_mla, tmp_path, QuantizeOptions(kv="fp32", weights="none"))
    engine = load(bundle, kernels=kernels, threads=1)
    ids = engine.tokenizer.encode(PROMPT)
    found = engine.generate(ids, GenerationOptions(max_tokens=128)).tokens
    theirs = AutoModelForCausalLM.from_pretrained(tiny_mla, dtype=torch.float32).eval()
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=128, do_sample=False)
    assert list(found) == expected[0, len(ids) :].tolist()
    assert len(found) == 128


@pytest.mark.parametrize(("kv", "most"), [("int4", 360), ("int8", 600), ("fp16", 1152)])
def test_a_token_costs_what_was_promised(
    tiny_mla: Path, tmp_path: Path, kv: str, most: int
) -> None:
    """Counted on the arrays that are bound, scales and zeros included, at DeepSeek's sizes."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 2, "v_head_dim": 24}
    theirs = random_model("deepseek_v2", moe=False, yarn=False, q_lora=False, **sizes)
    source = save_checkpoint(theirs, tmp_path / "source", tiny_mla)
    engine = load(bundle_of(source, tmp_path, QuantizeOptions(kv=kv, weights="int4", group=32)))
    assert engine.kv_bytes_per_token / 2 <= most
    assert engine.generate([5, 6, 7], GenerationOptions(max_tokens=3)).tokens


def test_a_quantised_bundle_still_writes_english(tiny_mla: Path, tmp_path: Path) -> None:
    engine = load(bundle_of(tiny_mla, tmp_path, QuantizeOptions(kv="int4", weights="int4")))
    text = engine.generate("My lord, the king is", GenerationOptions(max_tokens=60)).text
    common = sum(text.count(f" {word}") for word in ("the", "I", "and", "to", "my", "not"))
    assert common >= 5, text
