"""Bundles on a real GPU, through ONNX Runtime's CUDA provider, against the model on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.graph_runner import GraphRunner
from support.models import VOCAB, random_model, save_checkpoint

from mla_deploy.bundle import Bundle
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.gpu import gpu_target
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.runtime import Engine, GenerationOptions, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_target() is None, reason="there is no NVIDIA GPU"),
]


def engines(checkpoint: Path, folder: Path, kernels: str) -> tuple[Engine, Engine]:
    """The checkpoint on the CPU and on the GPU."""
    on_cpu = export_onnx(checkpoint, folder / "cpu").bundle
    on_gpu = export_onnx(checkpoint, folder / "cuda", target="cuda").bundle
    return load(on_cpu, max_tokens=1024), load(on_gpu, max_tokens=1024, kernels=kernels)


@pytest.mark.parametrize("cache", ["fp16", "int8", "int4"])
def test_tiny_mla_says_what_it_says_on_the_cpu(tiny_mla: Path, tmp_path: Path, cache: str) -> None:
    """Its rank is one that our kernels for GPUs do not have: onnxruntime's own compute it."""
    source = shutil.copytree(tiny_mla, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["mla_deploy"] = {"version": 1, "cache_format": cache}
    (source / "config.json").write_text(json.dumps(config))
    cpu, gpu = engines(source, tmp_path, "auto")
    options = GenerationOptions(max_tokens=64)
    expected, found = (one.generate("My lord, the king is", options) for one in (cpu, gpu))
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
@pytest.mark.parametrize("cache", ["fp16", "int8", "int4"])
def test_our_kernels_give_the_logits_of_the_graph(
    tiny_mla: Path, tmp_path: Path, cache: str, moe: bool
) -> None:
    """The same graph, computed by onnxruntime on the CPU; a bundle for the CPU would round
    activations to 8 bits. int4 weights; a prompt in pieces, which attention takes expanded and
    absorbed, then tokens, forks, a session from a file. Codes of the cache at an edge may fall the
    other way."""
    sizes = {"hidden_size": 128, "q_lora_rank": 64, "kv_lora_rank": 256, "v_head_dim": 24}
    model = random_model("deepseek_v3", moe=moe, yarn=True, q_lora=True, sharpness=1.0, **sizes)
    source = save_checkpoint(model, tmp_path / "source", tiny_mla)
    options = QuantizeOptions(kv=cache, weights="int4", group=32)
    quantize_checkpoint(source, tmp_path / "small", options)
    bundle = export_onnx(tmp_path / "small", tmp_path / "cuda", target="cuda").bundle
    ids = torch.randint(VOCAB, (220,))
    pieces = [ids[:70], ids[70:130], ids[130:200], *ids[200:].split(1), torch.tensor([7])]
    runner = GraphRunner(Bundle.open(bundle), 1, 256, padding=0)
    expected = [runner.append([piece])[0][-1].numpy() for piece in pieces]

    engine = load(bundle, max_tokens=1024, kernels="native")
    session = engine.session()
    found = [session.prefill(piece.tolist()) for piece in pieces[:3]]
    found += [session.decode(token) for token in ids[200:].tolist()]
    fork = session.fork()
    session.save(tmp_path / "session")
    loaded = engine.load_session(tmp_path / "session")
    again = [one.decode(7) for one in (session, fork, loaded)]
    np.testing.assert_array_equal(again[0], again[1])
    np.testing.assert_array_equal(again[0], again[2])
    errors = [
        float(np.abs(one - other).max() / np.abs(one).max())
        for one, other in zip(expected, [*found, again[0]], strict=True)
    ]
    print(cache, sorted(errors))
    # Routers choose other experts where two are nearly equal.
    bound = {"fp16": 5e-3, "int8": 1e-2, "int4": 5e-2}[cache] * (3 if moe else 1)
    assert np.median(errors) < bound
