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

The other records are built alike: `int4-g32` with groups of 32; `int3` and `int2` with fewer bits a
code (`cache_codes.pack_codes` has their order); `int8` symmetric; `fp8` with a float8 latent;
`fp16` and `fp32` as they are. `docs/cache-record.md` has all their bytes.

A token is encoded once, alone, when it is appended: nothing is ever quantised twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_deploy.cache import CachePart, CacheRecord, Layout
from mla_deploy.errors import ConfigError
from mla_deploy.quant.cache_codes import (
    decode_fp8,
    decode_symmetric_int8,
    encode_fp8,
    encode_symmetric_int8,
    group_size,
    pack_codes,
    solve_affine,
    unpack_codes,
)


class AffineRecord(CacheRecord):
    """Latent in 4, 3 or 2 bit with a float16 scale and zero a group, rope key in int8.

    A code of 3 bit is stored as its two low bits and its high one, each packed for itself.
    """

    def __init__(self, name: str, bits: int, largest_group: int) -> None:
        self.name = name
        self.levels = 2**bits - 1
        self._largest_group = largest_group
        self._planes = {4: (("codes", 4),), 3: (("codes", 2), ("high", 1)), 2: (("codes", 2),)}[
            bits
        ]

    def parts(self, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[CachePart, ...]:
        multiple = max(32 // bits for _, bits in self._planes)
        _check_sizes(self.name, kv_lora_rank, multiple, qk_rope_head_dim)
        groups = kv_lora_rank // group_size(kv_lora_rank, self._largest_group)
        return (
            *(
                CachePart(name, torch.uint8, Layout.BLOCKED, kv_lora_rank * bits // 8)
                for name, bits in self._planes
            ),
            CachePart("scale", torch.float16, Layout.COLUMNS, groups),
            CachePart("zero", torch.float16, Layout.COLUMNS, groups),
            *_rope_parts(qk_rope_head_dim),
        )

    def encode(self, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        tokens, rank = c_kv.shape
        group = group_size(rank, self._largest_group)
        codes, scale, zero = solve_affine(c_kv.reshape(tokens, rank // group, group), self.levels)
        codes = codes.reshape(tokens, rank)
        return [
            *self._packed(codes),
            scale.reshape(tokens, rank // group),
            zero.reshape(tokens, rank // group),
            *encode_symmetric_int8(k_pe, group_size(k_pe.shape[-1], 16)),
        ]

    def decode(
        self, values: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        *planes, scale, zero, k_pe_codes, k_pe_scale = values
        codes = unpack_codes(planes[0], self._planes[0][1]).to(dtype)
        if len(planes) > 1:
            codes = codes + 4 * unpack_codes(planes[1], 1).to(dtype)
        batch, tokens, groups = scale.shape
        rank = codes.shape[-1]
        grouped = codes.reshape(batch, tokens, groups, rank // groups)
        c_kv = grouped * scale.to(dtype).unsqueeze(3) + zero.to(dtype).unsqueeze(3)
        k_pe = decode_symmetric_int8(k_pe_codes, k_pe_scale, dtype)
        return c_kv.reshape(batch, tokens, rank), k_pe

    def _packed(self, codes: torch.Tensor) -> list[torch.Tensor]:
        if len(self._planes) == 1:
            return [pack_codes(codes, self._planes[0][1])]
        high = (codes > 3).to(codes.dtype)
        return [pack_codes(codes - 4 * high, 2), pack_codes(high, 1)]


class Fp8Record(CacheRecord):
    """Latent in float8 (E4M3) without a scale, since it has unit RMS; rope key in int8."""

    name = "fp8"

    def parts(self, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[CachePart, ...]:
        _check_sizes(self.name, kv_lora_rank, 4, qk_rope_head_dim)
        return (
            CachePart("codes", torch.uint8, Layout.BLOCKED, kv_lora_rank),
            *_rope_parts(qk_rope_head_dim),
        )

    def encode(self, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        group = group_size(k_pe.shape[-1], 16)
        return [encode_fp8(c_kv), *encode_symmetric_int8(k_pe, group)]

    def decode(
        self, values: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, k_pe_codes, k_pe_scale = values
        return decode_fp8(codes, dtype), decode_symmetric_int8(k_pe_codes, k_pe_scale, dtype)


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


INT4 = AffineRecord("int4", 4, 64)
INT4_G32 = AffineRecord("int4-g32", 4, 32)
INT3 = AffineRecord("int3", 3, 64)
INT2 = AffineRecord("int2", 2, 64)
FP8 = Fp8Record()
INT8 = Int8Record()
FP16 = FloatRecord("fp16", torch.float16)
FP32 = FloatRecord("fp32", torch.float32)
