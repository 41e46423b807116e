"""The main job: checkpoint, quantize, export, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import random_model, save_checkpoint

from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.families import load_config
from mla_deploy.model import forward_window, load_model
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


@pytest.mark.parametrize(
    ("kv", "first", "most"),
    [
        ("int4", None, 600 + 360),
        ("int4", "int4", 2 * 360),
        ("int8", None, 2 * 600),
        ("fp16", None, 2 * 1152),
    ],
)
def test_a_token_costs_what_was_promised(
    tiny_mla: Path, tmp_path: Path, kv: str, first: str | None, most: int
) -> None:
    """Counted on the arrays that are bound, scales and zeros included, at DeepSeek's sizes."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 2, "v_head_dim": 24}
    theirs = random_model("deepseek_v2", moe=False, yarn=False, q_lora=False, **sizes)
    source = save_checkpoint(theirs, tmp_path / "source", tiny_mla)
    options = QuantizeOptions(kv=kv, kv_first=first, weights="int4", group=32)
    engine = load(bundle_of(source, tmp_path, options))
    assert engine.kv_bytes_per_token <= most
    assert engine.generate([5, 6, 7], GenerationOptions(max_tokens=3)).tokens


@pytest.mark.parametrize("kernels", ["stock", "native"])
def test_a_first_layer_of_its_own_runs_as_the_reference_does(
    tiny_mla: Path, tmp_path: Path, kernels: str
) -> None:
    """int8 in the first layer, int4 behind it, nothing asked for."""
    bundle = bundle_of(tiny_mla, tmp_path, QuantizeOptions(weights="none"))
    engine = load(bundle, kernels=kernels, threads=1)
    formats = [layer.format for layer in engine.bundle.manifest.cache.layers]
    assert formats == ["int8", "int4", "int4", "int4"]
    assert engine.kv_bytes_per_token == 168 + 3 * 108
    ids = torch.tensor(engine.tokenizer.encode(PROMPT * 6))
    session = engine.session()
    found = [session.prefill(ids[:20].tolist())]
    found += [session.decode(token) for token in ids[20:].tolist()]
    small = tmp_path / "small"
    logits = forward_window(load_model(small), load_config(small), ids.unsqueeze(0))[0]
    expected = logits[19:].log_softmax(-1)
    kl = expected.exp() * (expected - torch.from_numpy(np.stack(found)).log_softmax(-1))
    # The kernels compute in fewer bits, and a code at an edge, or a router, may fall either way.
    print(kernels, kl.sum(-1).quantile(torch.tensor([0.5, 0.9, 1.0])))
    assert float(kl.sum(-1).median()) < 2e-3


def test_a_quantised_bundle_still_writes_english(tiny_mla: Path, tmp_path: Path) -> None:
    engine = load(bundle_of(tiny_mla, tmp_path, QuantizeOptions(kv="int4", weights="int4")))
    text = engine.generate("My lord, the king is", GenerationOptions(max_tokens=60)).text
    common = sum(text.count(f" {word}") for word in ("the", "I", "and", "to", "my", "not"))
    assert common >= 5, text
