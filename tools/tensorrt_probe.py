"""Asks TensorRT-RTX on a GPU what no document says: which engines run, and how INT4 inputs lie.

    python tools/tensorrt_probe.py                 # builds, loads and runs; needs a GPU
    python tools/tensorrt_probe.py --build-only    # as far as it goes without one

Three small graphs, each built for every target. `sm80+` is TensorRT-RTX's default, which names no
GPU.

    float   an addition: whether an engine of that target runs here at all
    weight  a product with an INT4 matrix, as all matrices in 4 bits are stored
    input   a row of 16 INT4 codes as input, in blocks of 8 with scales that are inputs too. Its 8
            bytes are 0x10, 0x32, ..., whose nibbles are 0 to 15, the lower ones first, that is 0 to
            7 and -8 to -1: the order of the output is the order of the nibbles
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CODES, BLOCK = 16, 8
SIGNED = np.array([code - 16 if code > 7 else code for code in range(CODES)], dtype=np.float32)
PACKED = bytes(2 * i | (2 * i + 1) << 4 for i in range(CODES // 2))
INPUTS = {
    "x": np.arange(CODES, dtype=np.float32)[None],
    "codes": np.frombuffer(PACKED, dtype=np.uint8),
    "scales": np.ones((1, CODES // BLOCK), dtype=np.float32),
}
SWAPPED = SIGNED.reshape(-1, 2)[:, ::-1].ravel()
EXPECTED = {
    "float": 2 * INPUTS["x"][0],
    "weight": INPUTS["x"][0] @ SIGNED[:, None],
    "input": 2 * SIGNED,
}


def graph(name: str) -> bytes:
    """One of the three, in opset 21."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, CODES))
    codes = helper.make_tensor_value_info("codes", TensorProto.INT4, (1, CODES))
    scales = helper.make_tensor_value_info("scales", TensorProto.FLOAT, (1, CODES // BLOCK))
    stored: list[TensorProto] = []
    if name == "float":
        inputs, nodes = [x], [helper.make_node("Add", ["x", "x"], ["y"])]
    elif name == "weight":
        matrix = helper.make_tensor("codes", TensorProto.INT4, (CODES, 1), PACKED, raw=True)
        ones = numpy_helper.from_array(np.ones((CODES // BLOCK, 1), dtype=np.float32), "scales")
        inputs, stored = [x], [matrix, ones]
        nodes = [
            helper.make_node(
                "DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=BLOCK
            ),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
    else:
        inputs = [codes, scales]
        nodes = [
            helper.make_node(
                "DequantizeLinear", ["codes", "scales"], ["r"], axis=1, block_size=BLOCK
            ),
            helper.make_node("Add", ["r", "r"], ["y"]),  # something to compute
        ]
    shape = (1, len(EXPECTED[name]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    body = helper.make_graph(nodes, "probe", inputs, [output], stored)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def build(trt: Any, logger: Any, name: str, target: str) -> bytes | str:
    """The engine, or what stopped it."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph(name)):
        return f"not parsed: {parser.get_error(0).desc()}"
    config = builder.create_builder_config()
    if not target.endswith("+"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    engine = builder.build_serialized_network(network, config)
    return "not built" if engine is None else bytes(engine)


def run(trt: Any, logger: Any, name: str, engine: bytes) -> np.ndarray[Any, Any] | str:
    """The output, or what stopped it."""
    import torch

    runtime = trt.Runtime(logger)
    validity, why = runtime.get_engine_validity(engine)
    said = (
        f"{validity.name}, diagnostics {why:#x}" if isinstance(why, int) else f"{validity}, {why}"
    )
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        return f"not loaded ({said})"
    context = loaded.create_execution_context()
    if context is None:
        return f"no context ({said})"
    output = torch.full((len(EXPECTED[name]),), torch.nan, device="cuda")
    inputs = {key: torch.tensor(value, device="cuda") for key, value in INPUTS.items()}
    for index in range(loaded.num_io_tensors):
        key = loaded.get_tensor_name(index)
        if not context.set_tensor_address(key, inputs.get(key, output).data_ptr()):
            return f"no address for {key} ({said})"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        return f"not run ({said})"
    torch.cuda.synchronize()
    found: np.ndarray[Any, Any] = output.cpu().numpy()
    return found


def verdict(name: str, found: np.ndarray[Any, Any]) -> str:
    """What an output means."""
    if name == "input" and np.allclose(found, 2 * SIGNED):
        return "runs; the lower nibble comes first"
    if name == "input" and np.allclose(found, 2 * SWAPPED):
        return "runs; the upper nibble comes first"
    return "runs" if np.allclose(found, EXPECTED[name]) else f"runs, and gives {found.tolist()}"


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--targets", nargs="+", default=("sm80+", "sm80", "sm86", "sm89", "sm120"))
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args()
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.WARNING)
    for target in options.targets:
        for name in EXPECTED:
            engine = build(trt, logger, name, target)
            if isinstance(engine, str) or options.build_only:
                told = engine if isinstance(engine, str) else f"built, {len(engine)} bytes"
            else:
                found = run(trt, logger, name, engine)
                told = found if isinstance(found, str) else verdict(name, found)
            print(f"{target} {name}: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
