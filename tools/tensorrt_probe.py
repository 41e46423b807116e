"""Asks TensorRT-RTX on a GPU what no document says: which engines run, and how INT4 inputs lie.

    python tools/tensorrt_probe.py                 # builds, loads and runs; needs a GPU
    python tools/tensorrt_probe.py --build-only    # as far as it goes without one

For each target an engine is built whose input is a row of 16 INT4 codes, in blocks of 8 with scales
that are inputs too, and whose output is what they stand for. The 8 bytes are 0x10, 0x32, ..., whose
nibbles are 0 to 15, the lower ones first, that is 0 to 7 and -8 to -1: the order of the output is
the order of the nibbles.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

CODES, BLOCK = 16, 8
SIGNED = [code - 16 if code > 7 else code for code in range(CODES)]


def graph() -> bytes:
    """DequantizeLinear of opset 21, and an addition, so that there is something to compute."""
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["real"], axis=1,
                         block_size=BLOCK),
        helper.make_node("Add", ["real", "real"], ["twice"]),
    ]  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("codes", TensorProto.INT4, (1, CODES)),
        helper.make_tensor_value_info("scales", TensorProto.FLOAT, (1, CODES // BLOCK)),
    ]
    outputs = [helper.make_tensor_value_info("twice", TensorProto.FLOAT, (1, CODES))]
    body = helper.make_graph(nodes, "probe", inputs, outputs)
    imports = [helper.make_opsetid("", 21)]
    return onnx.ModelProto.SerializeToString(
        helper.make_model(body, opset_imports=imports, ir_version=10)
    )


def build(trt: Any, logger: Any, target: str) -> bytes | None:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph()):
        print(f"{target}: not parsed: {parser.get_error(0).desc()}")
        return None
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        print(f"{target}: not built")
        return None
    return bytes(engine)


def run(trt: Any, logger: Any, engine: bytes) -> list[float] | str:
    """The output, or what stopped it."""
    import torch

    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        return "not loaded"
    context = loaded.create_execution_context()
    packed = [2 * i | (2 * i + 1) << 4 for i in range(CODES // 2)]
    tensors = {
        "codes": torch.tensor(packed, dtype=torch.uint8, device="cuda"),
        "scales": torch.ones(1, CODES // BLOCK, device="cuda"),
        "twice": torch.full((1, CODES), torch.nan, device="cuda"),
    }
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        return "not run"
    torch.cuda.synchronize()
    found: list[float] = (tensors["twice"][0] / 2).tolist()
    return found


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--targets", nargs="+", default=("sm80", "sm86", "sm89", "sm120"))
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args()
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.WARNING)
    for target in options.targets:
        engine = build(trt, logger, target)
        if engine is None:
            continue
        print(f"{target}: built, {len(engine)} bytes")
        if options.build_only:
            continue
        found = run(trt, logger, engine)
        if isinstance(found, str):
            print(f"{target}: {found}")
        elif np.allclose(found, SIGNED):
            print(f"{target}: runs; the lower nibble comes first")
        elif np.allclose(found, np.reshape(SIGNED, (-1, 2))[:, ::-1].ravel()):
            print(f"{target}: runs; the upper nibble comes first")
        else:
            print(f"{target}: runs, and gives {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
