"""TensorRT and CUDA: the only place of the runtime that imports them."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mla_deploy.bundle import Bundle
from mla_deploy.errors import BundleError, UsageError
from mla_deploy.gpu import gpu_target
from mla_deploy.manifest import PORTABLE_TARGET, EngineInfo, TensorRtInfo
from mla_deploy.runtime.tensorrt_cache import Array
from mla_deploy.runtime.tensorrt_plugin import (
    PLUGIN,
    PLUGIN_NAMESPACE,
    require_plugin_library,
)


def engine_for(info: TensorRtInfo, path: str, target: str | None) -> EngineInfo:
    """The engine for this machine's GPU.

    Raises:
        UsageError: there is no GPU.
        BundleError: the bundle has no engine for it.
    """
    if not info.engines:
        raise BundleError(
            f"{path} holds the graph, and no engine yet",
            hint=f"build one: mla-deploy export {path} -o BUNDLE --to tensorrt --target "
            f"{target or 'smNN'}",
        )
    if target is None:
        raise UsageError(
            "a TensorRT bundle needs an NVIDIA GPU and its driver",
            found="none",
            hint="export with --to onnx to run on the CPU",
        )
    suitable = [target]
    if int(target.removeprefix("sm")) >= 80:
        suitable.append(PORTABLE_TARGET)
    for name in suitable:
        for engine in info.engines:
            if engine.target == name:
                return engine
    raise BundleError(
        f"{path} has no engine for this GPU",
        found=target,
        allowed=", ".join(engine.target for engine in info.engines),
        hint=f"build one: mla-deploy export MODEL -o BUNDLE --to tensorrt --target {target}",
    )


def check_version(info: TensorRtInfo, path: str, target: str, installed: str) -> None:
    """Raise a BundleError unless this TensorRT is the one that built the engines."""
    if installed != info.version:
        raise BundleError(
            f"the engines of {path} were built by another TensorRT",
            found=f"{info.module} {installed}",
            allowed=f"{info.module} {info.version}",
            hint=f"build them again: mla-deploy export MODEL -o BUNDLE --to tensorrt --target "
            f"{target}; or install {info.module}=={info.version}",
        )


def open_engine(bundle: Bundle) -> tuple[CudaDevice, TensorRtExecution]:
    """The engine of a bundle on this machine's GPU.

    Raises:
        UsageError: no GPU, or TensorRT, cuda-python or a plugin that is needed is not installed.
        BundleError: no engine for this GPU and this TensorRT, or it cannot be loaded.
    """
    info = bundle.manifest.tensorrt
    assert info is not None
    entry = engine_for(info, str(bundle.path), gpu_target())
    trt = _import(info.module, "pip install tensorrt-rtx, or take JetPack's TensorRT")
    check_version(info, str(bundle.path), entry.target, trt.__version__)
    if info.plugin:
        load_plugin(trt, require_plugin_library())
    device = CudaDevice()
    try:
        return device, TensorRtExecution(trt, bundle, entry, device.stream)
    except BaseException:
        with suppress(UsageError):  # after a fault of the GPU nothing can be freed either
            device.close()
        raise


def load_plugin(trt: Any, library: Path) -> None:
    """Make LatentAttention known to TensorRT. Again does nothing.

    Raises:
        UsageError: the library cannot be loaded.
    """
    registry = trt.get_plugin_registry()
    registry.load_library(str(library))  # None where it failed, and where it was loaded before
    if registry.get_creator(PLUGIN, "1", PLUGIN_NAMESPACE) is None:
        raise UsageError(
            "TensorRT cannot load the plugin",
            found=str(library),
            hint="see that libmla_deploy_cuda.so lies beside it, and install from source again",
        )


class TensorRtExecution:
    """An engine and its context; `tensorrt_graph.Execution`."""

    def __init__(self, trt: Any, bundle: Bundle, entry: EngineInfo, stream: int) -> None:
        self._stream = stream
        self._logger = _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        data = bundle.file(entry.path).read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(data)
        self._context: Any = self._engine and self._engine.create_execution_context()
        if self._context is None:
            raise BundleError(
                f"TensorRT cannot load {bundle.file(entry.path)}",
                found=self._logger.last_error or "no reason given",
                hint="close other programs that use the GPU, or build the engine again",
            )

    def use_profile(self, index: int) -> None:
        self._check(self._context.set_optimization_profile_async(index, self._stream), "a profile")

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        self._check(self._context.set_input_shape(name, tuple(shape)), f"{name} as {shape}")

    def set_address(self, name: str, address: int) -> None:
        self._check(self._context.set_tensor_address(name, address), f"an address of {name}")

    def run(self) -> None:
        self._check(self._context.execute_async_v3(self._stream), "a step")

    def close(self) -> None:
        self._context = self._engine = self._runtime = None

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise BundleError(
                f"the engine refuses {what}",
                found=self._logger.last_error or None,
                hint="export the model again",
            )


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error, which is the reason of a failure."""

        def __init__(self) -> None:
            super().__init__()
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last_error = message.strip()[:500]

    return Logger()


class CudaDevice:
    """CUDA's runtime through cuda-python; `tensorrt_cache.Device`."""

    def __init__(self) -> None:
        self._cuda = _import("cuda.bindings.runtime", "pip install cuda-bindings")
        self._memory: list[int] = []
        self._sources: list[Array] = []
        """Arrays on their way: a GPU that reads pageable memory by itself may do so later."""
        self.stream = int(self._call("cudaStreamCreate"))
        self._free = weakref.finalize(self, _free, self._cuda, self._memory, self.stream)
        self._free.atexit = False  # the end of the process frees all

    def allocate(self, size: int) -> int:
        address = int(self._call("cudaMalloc", size))
        self._memory.append(address)
        self._call("cudaMemsetAsync", address, 0, size, self.stream)
        return address

    def upload(self, address: int, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = array.ctypes.data
        self._call("cudaMemcpyAsync", address, source, array.nbytes, kind, self.stream)
        self._sources.append(array)

    def download(self, address: int, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self._call("cudaStreamSynchronize", self.stream)
        self._sources.clear()

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        arguments = (to, to_pitch, source, source_pitch, width, height, kind, self.stream)
        self._call("cudaMemcpy2DAsync", *arguments)

    def close(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)
        self._free()

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of CUDA's runtime; raises what it reports."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(status)
            raise UsageError(
                f"CUDA refuses {name}",
                found=text.decode() if isinstance(text, bytes) else text,
                hint="if memory is short, load the bundle with a smaller max_tokens",
            )
        return values[0] if values else None


def _free(cuda: Any, memory: list[int], stream: int) -> None:
    """Give a device's memory back, once nobody uses it."""
    cuda.cudaStreamSynchronize(stream)
    for address in memory:
        cuda.cudaFree(address)
    cuda.cudaStreamDestroy(stream)


def _import(module: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{module} is not installed", hint=hint) from None
