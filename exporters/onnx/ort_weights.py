"""How ONNX Runtime's contrib operators want weights: what their lowerings share."""

from __future__ import annotations

import onnx_ir as ir
import torch

from mla_deploy.errors import ConfigError
from mla_deploy.exporters.onnx.builder import DTYPES
from mla_deploy.exporters.onnx.translate import Context, Weight
from mla_deploy.exporters.onnx.weights import packed_zero_chunks, plain_chunks

CONTRIB = "com.microsoft"
ACCURACY_LEVEL = {torch.float32: 4, torch.float16: 0}
"""`accuracy_level` of products with quantised matrices, by the type of activations. 4: these are
rounded to int8 a group, which adds 4e-3 to 8e-3 relative error and runs at the speed of memory. 0:
they are taken as they are, which is all that GPUs know."""


def stored_as(c: Context, weight: Weight, dtype: torch.dtype) -> ir.Value:
    """A weight as an initializer in another type."""
    return c.builder.initializer(
        weight.name, dtype, weight.shape, plain_chunks(weight.source, dtype)
    )


def packed_zeros(c: Context, zeros: Weight, bits: int) -> ir.Value:
    """Whole zeros, packed along the groups."""
    shape = (*zeros.shape[:-1], -(-zeros.shape[-1] * bits // 8))
    chunks = packed_zero_chunks(zeros.source, bits)
    return c.builder.initializer(zeros.name, torch.uint8, shape, chunks)


def require_whole_zeros(zeros: Weight) -> None:
    """Raise ConfigError if the zeros are HQQ's exact ones."""
    if zeros.dtype is not torch.uint8:
        raise ConfigError(
            f"{zeros.name}: ONNX Runtime's operator takes whole zeros only",
            found="exact zeros",
            hint="quantize experts and embedding with integer zeros",
        )


def cast(c: Context, x: ir.Value, given: torch.dtype, wanted: torch.dtype) -> ir.Value:
    """The value in the type wanted."""
    return x if given is wanted else c.builder.op("Cast", x, to=DTYPES[wanted].value)
