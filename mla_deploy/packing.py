"""How quantised weights lie in memory.

A matrix [out, in] is quantised along `in` in groups of `group` neighbours:

- codes  [out, in * bits / 8] uint8; at 4 bit the earlier channel is the low nibble;
- scales [out, in / group] float16;
- zeros  [out, in / group]: uint8 for whole zeros, float16 for HQQ's exact ones.

`weight = (code - zero) * scale`. Rows are independent of each other, so that matrices which read
the same input are joined by joining rows, and an expert is a slab of rows.
"""

from __future__ import annotations

import torch

CODES = "codes"
SCALES = "scales"
ZEROS = "zeros"
SUFFIXES = (CODES, SCALES, ZEROS)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Shapes: [..., in] uint8 below 2^bits, to [..., in * bits / 8] uint8."""
    if bits == 8:
        return codes
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Shapes: [..., in * bits / 8] uint8, to [..., in] uint8."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Shapes: codes [..., in * bits / 8], scales and zeros [..., in / group], to [..., in]."""
    grouped = unpack(codes, bits).unflatten(-1, (scales.shape[-1], -1)).to(dtype)
    return ((grouped - zeros.to(dtype)[..., None]) * scales.to(dtype)[..., None]).flatten(-2)
