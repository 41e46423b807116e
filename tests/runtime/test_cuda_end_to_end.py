"""Bundles on a real GPU, through ONNX Runtime's CUDA provider, against the model on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import VOCAB, random_model, save_checkpoint

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
def test_our_kernels_give_the_logits_of_the_cpu(
    tiny_mla: Path, tmp_path: Path, cache: str, moe: bool
) -> None:
    """int4 weights; a prompt in chunks and at once, then tokens, forks, a session from a file."""
    sizes = {"hidden_size": 128, "q_lora_rank": 64, "kv_lora_rank": 256, "v_head_dim": 24}
    model = random_model("deepseek_v3", moe=moe, yarn=True, q_lora=True, sharpness=1.0, **sizes)
    source = save_checkpoint(model, tmp_path / "source", tiny_mla)
    options = QuantizeOptions(kv=cache, weights="int4", group=32)
    quantize_checkpoint(source, tmp_path / "small", options)
    cpu, gpu = engines(tmp_path / "small", tmp_path, "native")
    ids = torch.randint(VOCAB, (150,)).tolist()
    rows = []
    for engine in (cpu, gpu):
        session = engine.session()
        logits = [session.prefill(ids[:70]), session.prefill(ids[70:130])]
        logits += [session.decode(token) for token in ids[130:]]
        fork = session.fork()
        session.save(tmp_path / "session")
        loaded = engine.load_session(tmp_path / "session")
        again = [one.decode(7) for one in (session, fork, loaded)]
        np.testing.assert_array_equal(again[0], again[1])
        np.testing.assert_array_equal(again[0], again[2])
        rows.append([*logits, again[0]])
    errors = [
        float(np.abs(one - other).max() / np.abs(one).max())
        for one, other in zip(*rows, strict=True)
    ]
    print(cache, sorted(errors))
    assert np.median(errors) < {"fp16": 5e-3, "int8": 2e-2, "int4": 1e-1}[cache]
