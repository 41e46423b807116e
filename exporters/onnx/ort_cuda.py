"""What the graph for ONNX Runtime's CUDA provider has of its own, table `ort-cuda1.28`.

Activations, float matrices and scales are in float16. In float32 stay the sum that runs through all
layers, norms of it, routers, and what goes on inside of LatentAttention.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from mla_deploy.errors import ConfigError
from mla_deploy.exporters.onnx import ort, ort_moe
from mla_deploy.exporters.onnx.translate import Context, Weight

NAME = "ort-cuda1.28"
DTYPE = torch.float16
OPSET = 23
"""The first with RMSNormalization. The provider's kernels come later than the CPU's: a Cast or
Reshape of an opset that it does not know is computed on the CPU."""
EXPERT_TILE = 64
"""QMoE reads experts in tiles of so many inputs."""


class OnnxRuntimeCuda(ort.OnnxRuntime):
    """The graph of `mla_deploy.manifest` for a GPU."""

    name = NAME
    opset = OPSET
    dtype = DTYPE

    def __init__(self) -> None:
        super().__init__()
        self.table = {
            **self.table,
            ort.ops.embedding_quantized.default: _embedding_quantized,
            ort.ops.moe_quantized.default: _moe_quantized,
        }


def _embedding_quantized(
    c: Context, ids: ir.Value, codes: Weight, scales: Weight, zeros: Weight, bits: int
) -> ir.Value:
    """Zeros in 4 bit are counted through all rows there, without the byte that ends a row."""
    groups = zeros.shape[1]
    if bits == 4 and groups % 2:
        raise ConfigError(
            f"{zeros.name}: ONNX Runtime's CUDA provider takes rows of whole bytes of zeros only",
            found=f"{groups} groups a row",
            allowed="an even number of groups",
            hint="quantize with a smaller --group, or keep the embedding in floating point",
        )
    return ort.embedding_quantized(c, ids, codes, scales, zeros, bits)


def _moe_quantized(
    c: Context,
    x: ir.Value,
    selection: ir.Value,
    weights: ir.Value,
    gate_up: list[Weight],
    down: list[Weight],
    top_k: int,
    bits: int,
) -> ir.Value:
    for codes, *_ in (gate_up, down):
        inputs = codes.shape[2] * 8 // bits
        if inputs % EXPERT_TILE:
            raise ConfigError(
                f"{codes.name}: ONNX Runtime's CUDA provider cannot multiply with these experts",
                found=f"{inputs} inputs",
                allowed=f"a multiple of {EXPERT_TILE}",
                hint="keep the experts in floating point",
            )
    return ort_moe.moe_quantized_by_logits(c, x, selection, weights, gate_up, down, top_k, bits)
