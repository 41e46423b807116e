"""An ONNX model of one EPContext node, through which ONNX Runtime's TensorRT providers load an
engine: that is how C++ programs run it, without TensorRT's headers.

The node and its attributes: ONNX Runtime's documentation, "EP context cache", and the attributes
that its providers read (`onnx_ctx_model_helper.h` of `nv_tensorrt_rtx` and `tensorrt`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from mla_deploy.manifest import TensorInfo

PROVIDERS = {
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_TYPES = {
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
}


def context_model(
    engine: str,
    module: str,
    version: str,
    target: str,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
) -> onnx.ModelProto:
    """The model.

    Args:
        engine: file name of the engine, beside the model.
        module: `tensorrt` or `tensorrt_rtx`.
        version: of that TensorRT.
        target: the GPU, as `sm89`.
    """
    node = helper.make_node(
        "EPContext",
        [one.name for one in inputs],
        [one.name for one in outputs],
        name="decoder",
        domain="com.microsoft",
        main_context=1,
        embed_mode=0,
        ep_cache_context=engine,
        source=PROVIDERS[module],
        ep_sdk_version=version,
        hardware_architecture=target.removeprefix("sm"),
        partition_name="decoder",
    )
    before, after = ([_value(tensor) for tensor in tensors] for tensors in (inputs, outputs))
    graph = helper.make_graph([node], "decoder", before, after)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
        producer_name="mla-deploy",
    )


def _value(tensor: TensorInfo) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, _TYPES[tensor.dtype], tensor.shape)
