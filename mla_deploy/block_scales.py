"""Matrices in float8 with a scale for each block, as DeepSeek-V3, Kimi-K2 and Qwen3 are published.

A matrix `X.weight` [rows, columns] of float8 (e4m3) has beside it `X.weight_scale_inv` [row blocks,
column blocks], the last blocks cut off where the size is no multiple. An element is its float8
value times the scale of its block (DeepSeek-V3, README_WEIGHTS.md). What the activations of such a
model would be rounded to does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mla_deploy.config_reader import ConfigReader
from mla_deploy.errors import ConfigError

METHOD = "fp8"
SCALE_SUFFIX = "_scale_inv"
_NEUTRAL = frozenset({"dequantize", "ignored_layers", "modules_to_not_convert", "scale_fmt"})
"""Which matrices are in float8, and how their scales are stored, the tensors say themselves."""

Block = tuple[int, int]
"""Rows and columns that share a scale."""


@dataclass(frozen=True)
class SourceQuantization:
    """How another tool quantised the weights: `quantization_config` of config.json."""

    method: str
    block: Block | None = None
    """Of float8 matrices."""


def read_quantization(value: object, origin: str) -> SourceQuantization | None:
    """Read a `quantization_config`.

    Args:
        value: None where config.json has none.
        origin: the file, for messages.

    Raises:
        ConfigError: it is no object, names no method, or is of float8 in another form than above.
    """
    if value is None:
        return None
    where = f"{origin}: quantization_config"
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where} must be an object", found=str(value)[:80], hint="get config.json again"
        )
    keys = ConfigReader(value, where, neutral=_NEUTRAL)
    method = keys.text("quant_method")
    if method != METHOD:
        return SourceQuantization(method)
    keys.expect("fmt", "e4m3")
    keys.expect("activation_scheme", "dynamic")
    block = keys.get("weight_block_size")
    keys.finish()
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise ConfigError(
            f"{where}: weight_block_size has a value that is not supported",
            found=str(block)[:80],
            allowed="[rows, columns] that share a scale, such as [128, 128]",
        )
    return SourceQuantization(method, (block[0], block[1]))


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales of a matrix [rows, columns]."""
    return tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=True))


def scaled(codes: torch.Tensor, scales: torch.Tensor, block: Block) -> torch.Tensor:
    """The matrix in float32: each code times the scale of its block.

    Args:
        codes: float8 [rows, columns].
        scales: any float type, of `scales_shape`.
    """
    height, width = block
    matrix = codes.float()
    by_column = scales.float().repeat_interleave(width, dim=1)[:, : matrix.shape[1]]
    for rows, scale in zip(matrix.split(height), by_column, strict=True):
        rows *= scale
    return matrix
