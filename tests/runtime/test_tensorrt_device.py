"""TensorRT and CUDA as the runner uses them, on stand-ins that keep books."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mla_deploy.bundle import Bundle
from mla_deploy.errors import BundleError, UsageError
from mla_deploy.manifest import EngineInfo
from mla_deploy.runtime import tensorrt_device
from mla_deploy.runtime.tensorrt_device import CudaDevice, TensorRtExecution, open_engine

ENGINE = EngineInfo(target="sm89", path="sm89.engine", context="sm89.onnx")


class Cuda:
    """`cuda.bindings.runtime`, as much as is needed; `failing` names a call that does not work."""

    def __init__(self) -> None:
        self.cudaError_t = SimpleNamespace(cudaSuccess=0)
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.held: set[int] = set()
        self.failing: str | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == self.failing:
                return (2,)
            if name == "cudaGetErrorString":
                return 0, b"out of memory"
            if name == "cudaMalloc":
                self.held.add(256 * (len(self.held) + 1))
                return 0, max(self.held)
            if name == "cudaStreamCreate":
                self.held.add(7)
                return 0, 7
            if name in ("cudaFree", "cudaStreamDestroy"):
                self.held.remove(arguments[0])
            return (0,)

        return call


class Trt:
    """`tensorrt`, whose engines do not load, or whose contexts do not take anything."""

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = 1, 0, 2

    __version__ = "1.7.1"

    def __init__(self, *, loads: bool) -> None:
        self.loads = loads

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def refuse(*_: object) -> bool:
            logger.log(self.ILogger.WARNING, "never mind")
            logger.log(self.ILogger.ERROR, "the shape is out of the profile")
            return False

        def load(_: bytes) -> Any:
            if not self.loads:
                logger.log(self.ILogger.ERROR, "built for another GPU")
                return None
            context = SimpleNamespace(set_input_shape=refuse)
            return SimpleNamespace(create_execution_context=lambda: context)

        return SimpleNamespace(deserialize_cuda_engine=load)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)  # type: ignore[arg-type]
    return made


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    """As much of one as an execution asks for."""
    (tmp_path / ENGINE.path).write_bytes(b"engine")
    info = SimpleNamespace(engines=[ENGINE], module="tensorrt_rtx", version="1.7.1", plugin=False)
    return SimpleNamespace(
        path=tmp_path,
        file=lambda name: tmp_path / name,
        manifest=SimpleNamespace(tensorrt=info),
    )


def test_memory_goes_back_when_it_is_closed(cuda: Cuda) -> None:
    device = CudaDevice()
    device.allocate(64)
    device.allocate(64)
    assert len(cuda.held) == 3
    device.close()
    assert cuda.held == set()


def test_memory_goes_back_when_it_is_forgotten(cuda: Cuda) -> None:
    CudaDevice().allocate(64)
    gc.collect()
    assert cuda.held == set()


def test_what_is_uploaded_lives_until_the_gpu_has_read_it(cuda: Cuda) -> None:
    device = CudaDevice()
    array = np.zeros(4, dtype=np.int64)
    alone = sys.getrefcount(array)
    device.upload(device.allocate(64), array)
    assert sys.getrefcount(array) > alone
    device.download(256, np.zeros(4, dtype=np.int64))
    assert sys.getrefcount(array) == alone


def test_what_cuda_refuses_is_told(cuda: Cuda) -> None:
    device = CudaDevice()
    cuda.failing = "cudaMalloc"
    with pytest.raises(UsageError, match="refuses cudaMalloc") as error:
        device.allocate(64)
    assert error.value.found == "out of memory"


def test_an_engine_that_does_not_load_says_why(
    cuda: Cuda, bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_device, "gpu_target", lambda: "sm89")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Trt(loads=False))  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"cannot load .*sm89\.engine") as error:
        open_engine(bundle)
    assert error.value.found == "built for another GPU"
    assert cuda.held == set()
    cuda.failing = "cudaStreamSynchronize"  # as after a fault of the GPU
    with pytest.raises(BundleError, match="cannot load"):
        open_engine(bundle)


def test_a_step_that_is_refused_says_why(bundle: Bundle) -> None:
    execution = TensorRtExecution(Trt(loads=True), bundle, ENGINE, stream=7)
    with pytest.raises(BundleError, match="refuses input_ids as") as error:
        execution.set_shape("input_ids", (1, 9))
    assert error.value.found == "the shape is out of the profile"
