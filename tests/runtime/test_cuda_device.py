"""The device cuda: what is missing where it cannot be had, and its memory where it fails.

The GPU is that of `cpp/cuda_double.py`, on which `test_core_engine.py` and
`test_core_session_file.py` run as a whole.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from ctypes import byref, c_void_p, sizeof
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpp.core_abi import EngineOptions, error_of, load_api, onnxruntime_library, status_of
from cpp.cuda_double import CudaApi, double_library, fail_after, for_cuda, recordings
from support.graph_runner import GraphRunner

from mla_deploy.bundle import Bundle
from mla_deploy.errors import BundleError, UsageError
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.runtime import load
from mla_deploy.runtime.cuda import CudaError


@pytest.fixture(scope="module")
def api() -> CudaApi:
    return CudaApi(load_api().path)


def random_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 256, count).tolist()
    return ids


# ---- what is missing


def test_a_bundle_for_the_cpu_is_refused(api: CudaApi, toy: Any) -> None:
    error = error_of(super(CudaApi, api).engine, toy.path, device="cuda")
    assert error.status == "BAD_BUNDLE"
    assert "--to onnx --target cuda" in error.text


def test_a_bundle_for_a_gpu_is_refused_on_the_cpu(api: CudaApi, toy: Any) -> None:
    error = error_of(api.engine, toy.path, device="cpu")
    assert error.status == "BAD_BUNDLE"
    assert "--to onnx --target cpu" in error.text


def test_an_unknown_device_is_refused(api: CudaApi, toy: Any) -> None:
    assert "cpu, cuda" in error_of(api.engine, toy.path, device="sm89").text


@pytest.mark.parametrize(
    ("library", "status", "text"),
    [
        (None, "INVALID_ARGUMENT", "-DMLA_CUDA=ON"),
        ("/nowhere/libmla_deploy_cuda.so", "BAD_RUNTIME", "-C cmake.define.MLA_CUDA=ON"),
        ("libm.so.6", "BAD_RUNTIME", "it has no mla_cuda_"),
    ],
)
def test_a_library_of_kernels_is_needed(
    api: CudaApi, toy: Any, library: str | None, status: str, text: str
) -> None:
    error = error_of(api.engine, toy.path, cuda_library=library)
    assert error.status == status
    assert text in error.text


@pytest.mark.parametrize("found", ["no driver", "this library was built for sm_80 sm_90"])
def test_a_driver_and_a_device_are_needed(
    api: CudaApi, toy: Any, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """What the library says, which knows."""
    monkeypatch.setenv("MLA_TEST_DOUBLE_DEVICE", found)
    error = error_of(api.engine, toy.path)
    assert error.status == "BAD_RUNTIME"
    assert found in error.text


def test_an_onnxruntime_with_a_cuda_provider_is_needed(api: CudaApi, toy: Any) -> None:
    """Here the real one answers, and has none."""
    error = error_of(api.engine, toy.path, onnxruntime_library=onnxruntime_library())
    assert error.status == "BAD_RUNTIME"
    assert "cannot use its CUDA provider" in error.text
    assert "onnxruntime-gpu" in error.text


def test_a_provider_that_lacks_its_libraries_says_which(
    api: CudaApi, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA_TEST_DOUBLE_PROVIDER", "libcudnn.so.9: cannot open")
    assert "libcudnn.so.9" in error_of(api.engine, toy.path).text


def test_programs_of_older_headers_still_work(api: CudaApi, toy: Any) -> None:
    """Whose options end before the device."""
    old = EngineOptions.device.offset
    given = (ctypes.c_char * sizeof(EngineOptions))()
    options = EngineOptions.from_buffer(given)
    options.struct_size = old
    options.bundle = str(toy.path).encode()
    options.onnxruntime_library = str(onnxruntime_library()).encode()
    options.threads = 1
    ctypes.memset(byref(options, old), 0xFF, sizeof(EngineOptions) - old)  # not to be read
    handle = api.make("mla_engine_open", byref(options))
    api.call("mla_engine_close", handle)
    options.struct_size = old - 1
    out = c_void_p()
    assert status_of(api.call, "mla_engine_open", byref(options), byref(out)) == "INVALID_ARGUMENT"


def test_python_says_that_there_are_no_kernels(
    own_toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla_deploy.runtime.cuda.LIBRARY", "nowhere.so")
    with pytest.raises(CudaError, match="has no CUDA kernels"):
        load(for_cuda(own_toy.path))


def test_python_gives_what_the_engine_says(own_toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = double_library()
    monkeypatch.setattr("mla_deploy.runtime.loading.cuda_library", lambda: library)
    with pytest.raises(UsageError, match="no such device"):
        load(own_toy.path, device="sm89")
    with pytest.raises(BundleError, match="not exported for the device cuda"):
        load(own_toy.path, device="cuda")
    twin = for_cuda(own_toy.path)
    with pytest.raises(BundleError, match="not exported for the device cpu"):
        load(twin, device="cpu")
    with pytest.raises(UsageError, match="cannot use its CUDA provider"):
        load(twin)
    monkeypatch.setattr("mla_deploy.runtime.loading.onnxruntime_library", lambda: library)
    engine = load(twin, kernels="stock", threads=1)
    ids = random_ids(100)
    assert list(engine.generate(ids).tokens[:8]) == own_toy.greedy(ids, 8)


# ---- memory


def test_a_full_device_is_told(api: CudaApi, toy: Any) -> None:
    double_library()
    fail_after(0)
    try:
        error = error_of(api.engine, toy.path)
    finally:
        fail_after(-1)
    assert error.status == "OUT_OF_MEMORY"
    assert "max_tokens" in error.text


def test_the_memory_goes_back(api: CudaApi, toy: Any) -> None:
    regions = ctypes.CDLL(str(double_library())).double_regions
    before = regions()
    engine = api.engine(toy.path)
    session = engine.session()
    assert regions() == before + 2
    engine.close()
    session.prefill([1, 2])
    session.destroy()
    assert regions() == before


@pytest.mark.parametrize("operations", range(6))
def test_where_the_device_fails_nothing_has_changed(
    api: CudaApi, toy: Any, operations: int
) -> None:
    """In a step that takes pages which were used, and that copies one which is shared: two arrays,
    so two or four operations each, and a wait."""
    engine = api.engine(toy.path, max_tokens=64 * 5)
    ids = random_ids(100)
    used = engine.session()
    used.prefill(random_ids(150, seed=1))
    used.destroy()
    session = engine.session()
    session.prefill(ids)
    fork = session.fork()
    free = engine.info.free_tokens
    fail_after(operations)
    try:
        error = error_of(fork.prefill, random_ids(60))
    finally:
        fail_after(-1)
    assert error.status == "MODEL_FAILED"
    assert engine.info.free_tokens == free
    for one in (fork, session):
        assert one.tokens == ids
        np.testing.assert_array_equal(one.decode(7), toy.logits([*ids, 7]))
        one.rewind(100)
    for one in (fork, session):
        one.destroy()
    assert engine.info.free_tokens == 64 * 5


# ---- recorded steps


def test_steps_of_one_token_are_recorded_once_a_shape(api: CudaApi, toy: Any) -> None:
    """Tables grow in powers of two; prompts, and steps of several tokens, are not recorded."""
    engine = api.engine(toy.path, max_tokens=64 * 8)
    ids = random_ids(64 * 3 + 10)
    before = recordings()
    session = engine.session()
    session.prefill(ids[:60])
    assert recordings() == before
    for at in range(60, len(ids)):
        np.testing.assert_array_equal(session.decode(ids[at]), toy.logits(ids[: at + 1]))
    assert recordings() == before + 3  # of 1, 2 and 4 pages
    other = engine.session()
    other.prefill(ids[:60])
    np.testing.assert_array_equal(other.decode(3), toy.logits([*ids[:60], 3]))
    assert recordings() == before + 3


def test_an_exported_bundle_runs_on_it(api: CudaApi, tiny_mla: Path, tmp_path: Path) -> None:
    """All parts of an int4 record; the same graph in the same onnxruntime gives the same logits."""
    source = shutil.copytree(tiny_mla, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["mla_deploy"] = {"version": 1, "cache_format": "int4"}
    (source / "config.json").write_text(json.dumps(config))
    bundle = Bundle.open(export_onnx(source, tmp_path / "bundle", target="cuda").bundle)
    ids = torch.randint(4096, (80,))
    runner = GraphRunner(bundle, 1, 128, padding=0)
    expected = [runner.append([ids[:70]])[0][-1]]
    expected += [runner.append([ids[at, None]])[0][-1] for at in range(70, 80)]
    library = double_library()
    engine = super(CudaApi, api).engine(
        bundle.path, onnxruntime_library=library, cuda_library=library, max_tokens=256
    )
    session = engine.session()
    found = [session.prefill(ids[:70].tolist())]
    found += [session.decode(token) for token in ids[70:].tolist()]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=2e-2)
