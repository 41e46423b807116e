"""At full rank with all positions kept, a conversion is a change of basis and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.graph_runner import GraphRunner
from support.models import VOCAB, relative_error, save_checkpoint, transformers_logits
from support.sources import CLASSES, ROPES, byte_tokenizer, random_source

from mla_deploy.bundle import Bundle
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.families import load_config
from mla_deploy.model import forward_window, load_model, set_attention_mode
from mla_deploy.quant.compress.convert import convert_checkpoint
from mla_deploy.quant.compress.options import ConvertOptions

BOUND = 1e-4
GROUPS, HEAD_DIM = 4, 16
FULL = {"kv_lora_rank": GROUPS * HEAD_DIM, "qk_rope_head_dim": GROUPS * HEAD_DIM}


def converted(theirs: Any, folder: Path, **options: Any) -> Path:
    """Convert on the model's own text; the source and the result lie in `folder`."""
    source = save_checkpoint(theirs, folder / "source", None)
    byte_tokenizer(source)
    chosen = {"calibration": ("self",), "tokens": 400, "window": 32, **options}
    convert_checkpoint(source, folder / "out", ConvertOptions(**chosen))
    return folder / "out"


def assert_equal(theirs: Any, folder: Path, bound: float = BOUND) -> None:
    ids = torch.randint(VOCAB, (1, 150))
    expected = transformers_logits(theirs, ids[0])
    config, ours = load_config(folder), load_model(folder)
    for mode in ("absorbed", "expanded"):
        set_attention_mode(ours, mode)
        assert relative_error(forward_window(ours, config, ids)[0], expected) < bound, mode


@pytest.mark.parametrize("family", CLASSES)
def test_full_size_equals_the_source(tmp_path: Path, family: str) -> None:
    theirs = random_source(family)
    assert_equal(theirs, converted(theirs, tmp_path, **FULL))


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_full_size_equals_a_source_with_scaled_positions(tmp_path: Path, rope: str) -> None:
    theirs = random_source("llama", rope)
    assert_equal(theirs, converted(theirs, tmp_path, **FULL))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 8}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
    ],
    ids=["mha", "bias_tied", "norm_and_bias"],
)
def test_full_size_equals_variants(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    theirs = random_source(family, **changes)
    width = changes.get("num_key_value_heads", GROUPS) * HEAD_DIM
    out = converted(theirs, tmp_path, kv_lora_rank=width, qk_rope_head_dim=width)
    assert_equal(theirs, out)


@pytest.mark.parametrize("method", ["mha2mla-high-joint", "mha2mla-2norm-split", "transmla"])
def test_the_published_methods_are_exact_at_full_size_too(tmp_path: Path, method: str) -> None:
    theirs = random_source("llama")
    assert_equal(theirs, converted(theirs, tmp_path, method=method, **FULL))


def test_layers_without_positions_need_no_rotary_channels(tmp_path: Path) -> None:
    """All of SmolLM3's layers without positions: the latent alone must be exact."""
    theirs = random_source("smollm3", no_rope_layers=[0, 0])
    rank = 2 * GROUPS * HEAD_DIM - 2
    assert_equal(theirs, converted(theirs, tmp_path, kv_lora_rank=rank, qk_rope_head_dim=2))


def test_weights_alone_suffice_at_full_size(tmp_path: Path) -> None:
    theirs = random_source("qwen2")
    out = converted(
        theirs, tmp_path, calibration=(), no_calibration=True, tokens=None, window=None, **FULL
    )
    assert_equal(theirs, out)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_exported_graph_equals_the_source(tmp_path: Path, family: str) -> None:
    """On stock onnxruntime, prompt and then token by token."""
    theirs = random_source(family)
    out = converted(theirs, tmp_path, **FULL)
    bundle = Bundle.open(export_onnx(out, tmp_path / "bundle").bundle)
    text = torch.randint(VOCAB, (100,))
    runner = GraphRunner(bundle, 1, len(text))
    pieces = runner.append([text[:70]])
    for step in range(70, len(text)):
        pieces += runner.append([text[step, None]])
    assert relative_error(torch.cat(pieces), transformers_logits(theirs, text)) < BOUND


def test_a_smaller_size_is_not_exact(tmp_path: Path) -> None:
    """The bound of the tests above can be missed."""
    theirs = random_source("llama")
    out = converted(theirs, tmp_path, kv_lora_rank=GROUPS * HEAD_DIM - 2, qk_rope_head_dim=62)
    ids = torch.randint(VOCAB, (1, 150))
    found = forward_window(load_model(out), load_config(out), ids)[0]
    assert relative_error(found, transformers_logits(theirs, ids[0])) > 100 * BOUND
