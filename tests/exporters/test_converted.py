"""Graphs of models that were converted to latent attention, for targets that compute in float16.

Each layer has frequencies of its own there, and what comes of Qwen3 norms on queries and keys.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.graph_runner import GraphRunner
from support.host_engine import host_graph
from support.models import VOCAB, save_checkpoint
from support.sources import byte_tokenizer, random_source, random_text

from mla_deploy.bundle import Bundle
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.exporters.tensorrt.export import TensorRtOptions, export_tensorrt
from mla_deploy.families import load_config
from mla_deploy.model import forward_window, load_model
from mla_deploy.quant.compress.convert import convert_checkpoint
from mla_deploy.quant.compress.options import ConvertOptions

TOKENS = 200
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-3}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    source = save_checkpoint(random_source(request.param), folder / "source", None)
    byte_tokenizer(source)
    options = ConvertOptions(
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        calibration=(str(random_text(folder)),),
        tokens=2048,
        window=64,
    )
    convert_checkpoint(source, folder / "mla", options)
    return folder / "mla"


def row_errors(checkpoint: Path, ids: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The largest deviation of each position over the largest logit."""
    expected = forward_window(load_model(checkpoint), load_config(checkpoint), ids[None])[0]
    return (found - expected).abs().amax(-1) / expected.abs().max()


def assert_frequencies_are_exact(checkpoint: Path, bundle: Path) -> None:
    """Rounded to float16 they would show in the logits of long texts only."""
    graph = onnx.load(bundle / "model.onnx").graph
    held = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    expected = load_config(checkpoint).rope.inv_freq
    assert expected is not None
    for layer, values in enumerate(expected):
        found = held[f"model.layers.{layer}.self_attn.inv_freq"]
        np.testing.assert_array_equal(found, np.array(values, dtype=np.float32), strict=True)


def test_the_graph_for_a_gpu_equals_the_reference(converted: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(export_onnx(converted, tmp_path / "bundle", target="cuda").bundle)
    ids = torch.randint(VOCAB, (TOKENS,))
    errors = row_errors(converted, ids, GraphRunner(bundle, 1, TOKENS).append([ids])[0])
    assert errors.quantile(0.9) < TOLERANCE["fp16"]
    assert_frequencies_are_exact(converted, tmp_path / "bundle")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_graph_for_tensorrt_equals_the_reference(
    converted: Path, tmp_path: Path, dtype: str
) -> None:
    chosen = TensorRtOptions(onnx_only=True, dtype=dtype, max_tokens=256, prefill_chunk=64)
    graph = host_graph(export_tensorrt(converted, tmp_path / "bundle", chosen).bundle)
    ids = torch.randint(VOCAB, (TOKENS,))
    found = graph.append(graph.cache.open(), ids.tolist(), 0, range(TOKENS))
    errors = row_errors(converted, ids, torch.from_numpy(np.asarray(found)))
    assert errors.quantile(0.9) < TOLERANCE[dtype]
    assert_frequencies_are_exact(converted, tmp_path / "bundle")
