"""Stands in for a GPU: an engine's ONNX run by onnxruntime on memory of the host.

It is as strict as TensorRT: shapes within the profile, aligned addresses, memory in bounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mla_deploy.bundle import Bundle
from mla_deploy.runtime.tensorrt_graph import TensorRtGraph
from support.operator_library import built_library

ELEMENT = {"int64": np.int64, "uint8": np.uint8, "int8": np.int8, "float16": np.float16}
ELEMENT["float32"] = np.float32


class HostDevice:
    """`Device` on memory of the host, filled with rubbish where nobody was promised zeros."""

    stream = 0

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.copies = 0

    def allocate(self, size: int) -> int:
        block = np.zeros(size + 256, np.uint8)
        address = -(-block.ctypes.data // 256) * 256
        self.blocks[address] = (block, size)
        return address

    def check(self, address: int, size: int) -> None:
        assert any(at <= address and address + size <= at + n for at, (_, n) in self.blocks.items())

    def upload(self, address: int, array: Any) -> None:
        self.check(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: Any) -> None:
        self.check(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        self.copies += 1
        assert width <= min(to_pitch, source_pitch)
        for line in range(height):
            self.check(to + line * to_pitch, width)
            self.check(source + line * source_pitch, width)
            ctypes.memmove(to + line * to_pitch, source + line * source_pitch, width)

    def close(self) -> None:
        self.blocks.clear()


class HostExecution:
    """`Execution` by onnxruntime, with optimisation off."""

    def __init__(self, bundle: Bundle, device: HostDevice, graph: str = "model.onnx") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        info = bundle.manifest.tensorrt
        assert info is not None
        if info.plugin and graph == "model.onnx":  # the same node, by the CPU's kernels
            options.register_custom_ops_library(str(built_library()))
        path = str(bundle.path / graph)
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.info, self.device = info, device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.log: list[dict[str, tuple[int, ...]]] = []

    def use_profile(self, index: int) -> None:
        self.profile = index
        self.shapes.clear()
        self.addresses.clear()

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        assert self.profile is not None
        profile = self.info.profiles[self.profile]
        wanted = next(one.shape for one in self.info.inputs if one.name == name)
        for size, extent in zip(shape, wanted, strict=True):
            if isinstance(extent, str):
                least, _, most = profile.extent(extent)
                assert least <= size <= most, (name, shape)
            else:
                assert size == extent
        self.shapes[name] = tuple(shape)

    def set_address(self, name: str, address: int) -> None:
        assert address % 256 == 0
        self.addresses[name] = address

    def run(self) -> None:
        self.log.append(dict(self.shapes))
        sizes = {
            axis: size
            for one in self.info.inputs
            for axis, size in zip(one.shape, self.shapes[one.name], strict=True)
        }
        binding = self.session.io_binding()
        for one in self.info.inputs:
            self._bind(binding.bind_input, one.name, one.dtype, self.shapes[one.name])
        for one in self.info.outputs:
            shape = tuple(sizes.get(size, size) for size in one.shape)
            self._bind(binding.bind_output, one.name, one.dtype, shape)
        self.session.run_with_iobinding(binding)

    def _bind(self, bind: Any, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        element, address = ELEMENT[dtype], self.addresses[name]
        self.device.check(address, int(np.prod(shape)) * np.dtype(element).itemsize)
        bind(name, "cpu", 0, element, list(shape), address)

    def close(self) -> None:
        self.addresses.clear()


def host_graph(
    bundle: Path, max_tokens: int | None = None, graph: str = "model.onnx"
) -> TensorRtGraph:
    """The graph of a bundle that was exported with --onnx-only, on the host.

    Args:
        graph: another one in its folder, in standard operators.
    """
    opened = Bundle.open(bundle)
    device = HostDevice()
    execution = HostExecution(opened, device, graph)
    return TensorRtGraph(opened.manifest, device, execution, max_tokens)
