"""The cache records: the one definition of the bytes a token leaves behind.

The Python reference, the ONNX function body (traced from here), the C++ and CUDA kernels and
`docs/cache-record.md` all follow this file and are checked against it.

Record `int4`, bytes per token and layer at kv_lora_rank 512 and qk_rope_head_dim 64:

| part        | type    | layout  | holds                                              | bytes |
|-------------|---------|---------|----------------------------------------------------|-------|
| codes       | uint8   | blocked | two 4-bit codes a byte                             | 256   |
| scale       | float16 | columns | one a group of 64 channels                         | 16    |
| zero        | float16 | columns | one a group: the value that code 0 stands for      | 16    |
| k_pe_codes  | int8    | blocked | the rotated key                                    | 64    |
| k_pe_scale  | float16 | columns | one a group of 16 channels                         | 8     |
|             |         |         |                                                    | 360   |

`c = scale * code + zero` and `k_pe = k_pe_scale * k_pe_code`. Byte 4 k + j of a token's codes holds
channel 8 k + j in its low and channel 8 k + 4 + j in its high nibble (0 <= j < 4), so that after a
mask and a shift each half is four neighbouring channels.

A token is encoded once, alone, when it is appended: nothing is ever quantised twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_deploy.cache import CachePart, CacheRecord, Layout
from mla_deploy.errors import ConfigError

LEVELS = 15
"""The largest 4-bit code."""
ROUNDS = 3
"""Alternations of codes and least-squares (scale, zero). Three reach the error of twenty HQQ steps
with the least-squares scale (`benchmarks/latent_solver.py`) and need no power function."""
TINY = 1e-30
"""Scales below it count as zero: their reciprocal would leave float32."""


def group_size(width: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides `width`."""
    size = largest
    while width % size:
        size //= 2
    return size


def solve_affine_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero of each group in closed form.

    Minimises `sum (x - scale * code - zero)^2` by alternation: codes are rounded for a given
    (scale, zero), then both follow from linear regression on the codes. This is the alternation of
    HQQ (Badri and Shaji, 2023) with its sparse error term left out and the least-squares scale
    taken in. Scale and zero are rounded to float16 before the last codes are chosen.

    Shapes: x [..., group] float32, to codes [..., group] (whole numbers as float32, 0 to 15),
    scale [..., 1] float16, zero [..., 1] float16.
    """
    low = x.amin(-1, keepdim=True)
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    scale = (x.amax(-1, keepdim=True) - low) / LEVELS
    zero = low
    for _ in range(ROUNDS):
        codes = _nearest_code(x, scale, zero)
        code_mean = codes.mean(-1, keepdim=True)
        code_centred = codes - code_mean
        spread = (code_centred * code_centred).sum(-1, keepdim=True)
        slope = (code_centred * centred).sum(-1, keepdim=True) / spread.clamp_min(1e-6)
        scale = torch.where(spread > 0, slope, scale)
        zero = mean - scale * code_mean
    stored_scale = scale.to(torch.float16)
    stored_zero = (mean - stored_scale.to(x.dtype) * code_mean).to(torch.float16)
    codes = _nearest_code(x, stored_scale.to(x.dtype), stored_zero.to(x.dtype))
    return codes, stored_scale, stored_zero


def _nearest_code(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scale > TINY, 1.0 / scale, torch.zeros_like(scale))
    return ((x - zero) * inverse).round().clamp(0, LEVELS)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Shapes: [T, rank] whole numbers 0 to 15, to [T, rank / 2] uint8 in the record's order."""
    tokens, rank = codes.shape
    pairs = codes.reshape(tokens, rank // 8, 2, 4)
    packed = pairs[:, :, 0] + pairs[:, :, 1] * 16
    return packed.to(torch.uint8).reshape(tokens, rank // 2)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Shapes: [B, T, rank / 2] uint8, to [B, T, rank] uint8."""
    batch, tokens, half = packed.shape
    quads = packed.reshape(batch, tokens, half // 4, 4)
    both = torch.stack([quads & 15, quads >> 4], dim=3)
    return both.reshape(batch, tokens, 2 * half)


def encode_symmetric_int8(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit groups.

    Shapes: x [T, width] float32, to codes [T, width] int8, scale [T, width / group] float16.
    """
    tokens, width = x.shape
    grouped = x.reshape(tokens, width // group, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
    wide = scale.to(x.dtype)
    inverse = torch.where(wide > TINY, 1.0 / wide, torch.zeros_like(wide))
    codes = (grouped * inverse).round().clamp(-127, 127)
    return codes.to(torch.int8).reshape(tokens, width), scale.reshape(tokens, width // group)


def decode_symmetric_int8(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Shapes: codes [B, T, width] int8, scale [B, T, groups], to [B, T, width]."""
    batch, tokens, groups = scale.shape
    width = codes.shape[-1]
    grouped = codes.to(dtype).reshape(batch, tokens, groups, width // groups)
    return (grouped * scale.to(dtype).unsqueeze(3)).reshape(batch, tokens, width)


class Int4Record(CacheRecord):
    """Latent in 4 bit with float16 scale and zero a group of 64, rope key in int8."""

    name = "int4"

    def parts(self, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[CachePart, ...]:
        _check_sizes(self.name, kv_lora_rank, 8, qk_rope_head_dim)
        groups = kv_lora_rank // group_size(kv_lora_rank, 64)
        return (
            CachePart("codes", torch.uint8, Layout.BLOCKED, kv_lora_rank // 2),
            CachePart("scale", torch.float16, Layout.COLUMNS, groups),
            CachePart("zero", torch.float16, Layout.COLUMNS, groups),
            *_rope_parts(qk_rope_head_dim),
        )

    def encode(self, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        tokens, rank = c_kv.shape
        group = group_size(rank, 64)
        grouped = c_kv.reshape(tokens, rank // group, group)
        codes, scale, zero = solve_affine_int4(grouped)
        return [
            pack_nibbles(codes.reshape(tokens, rank)),
            scale.reshape(tokens, rank // group),
            zero.reshape(tokens, rank // group),
            *encode_symmetric_int8(k_pe, group_size(k_pe.shape[-1], 16)),
        ]

    def decode(
        self, values: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scale, zero, k_pe_codes, k_pe_scale = values
        batch, tokens, groups = scale.shape
        rank = 2 * packed.shape[-1]
        codes = unpack_nibbles(packed).to(dtype).reshape(batch, tokens, groups, rank // groups)
        c_kv = codes * scale.to(dtype).unsqueeze(3) + zero.to(dtype).unsqueeze(3)
        k_pe = decode_symmetric_int8(k_pe_codes, k_pe_scale, dtype)
        return c_kv.reshape(batch, tokens, rank), k_pe


class Int8Record(CacheRecord):
    """Latent in symmetric int8 with a float16 scale a group of 64, rope key in int8."""

    name = "int8"

    def parts(self, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[CachePart, ...]:
        _check_sizes(self.name, kv_lora_rank, 4, qk_rope_head_dim)
        groups = kv_lora_rank // group_size(kv_lora_rank, 64)
        return (
            CachePart("codes", torch.int8, Layout.BLOCKED, kv_lora_rank),
            CachePart("scale", torch.float16, Layout.COLUMNS, groups),
            *_rope_parts(qk_rope_head_dim),
        )

    def encode(self, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        return [
            *encode_symmetric_int8(c_kv, group_size(c_kv.shape[-1], 64)),
            *encode_symmetric_int8(k_pe, group_size(k_pe.shape[-1], 16)),
        ]

    def decode(
        self, values: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale, k_pe_codes, k_pe_scale = values
        return (
            decode_symmetric_int8(codes, scale, dtype),
            decode_symmetric_int8(k_pe_codes, k_pe_scale, dtype),
        )


class FloatRecord(CacheRecord):
    """Latent and rope key as they are, in float16 or float32."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype = dtype

    def parts(self, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[CachePart, ...]:
        return (
            CachePart("c_kv", self._dtype, Layout.ROWS, kv_lora_rank),
            CachePart("k_pe", self._dtype, Layout.ROWS, qk_rope_head_dim),
        )

    def encode(self, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        return [c_kv.to(self._dtype), k_pe.to(self._dtype)]

    def decode(
        self, values: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        c_kv, k_pe = values
        return c_kv.to(dtype), k_pe.to(dtype)


def _rope_parts(qk_rope_head_dim: int) -> tuple[CachePart, CachePart]:
    groups = qk_rope_head_dim // group_size(qk_rope_head_dim, 16)
    return (
        CachePart("k_pe_codes", torch.int8, Layout.BLOCKED, qk_rope_head_dim),
        CachePart("k_pe_scale", torch.float16, Layout.COLUMNS, groups),
    )


def _check_sizes(name: str, kv_lora_rank: int, multiple: int, qk_rope_head_dim: int) -> None:
    if kv_lora_rank % multiple or qk_rope_head_dim % 4:
        raise ConfigError(
            f"the {name} cache cannot hold this latent",
            found=f"kv_lora_rank {kv_lora_rank}, qk_rope_head_dim {qk_rope_head_dim}",
            allowed=f"kv_lora_rank a multiple of {multiple}, qk_rope_head_dim a multiple of 4",
            hint="quantize with --kv fp16",
        )


INT4 = Int4Record()
INT8 = Int8Record()
FP16 = FloatRecord("fp16", torch.float16)
FP32 = FloatRecord("fp32", torch.float32)
