"""What the cache records are made of: solvers, packing, and number formats, in plain torch.

Everything here is traced into the ONNX function body, so it is written with operators that the
lowering table of every target has, and gives the same codes there.
"""

from __future__ import annotations

import torch

ROUNDS = 3
"""Alternations of codes and least-squares (scale, zero). Three reach the error of twenty HQQ steps
with the least-squares scale (`benchmarks/latent_solver.py`) and need no power function."""
TINY = 1e-30
"""Scales below it count as zero: their reciprocal would leave float32."""
FP8_LARGEST = 448.0
FP8_BINADES = range(-5, 9)
"""Exponents above that of the subnormal numbers of E4M3."""


def group_size(width: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides `width`."""
    size = largest
    while width % size:
        size //= 2
    return size


def solve_affine(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero of each group in closed form.

    Minimises `sum (x - scale * code - zero)^2` by alternation: codes are rounded for a given
    (scale, zero), then both follow from linear regression on the codes. This is the alternation of
    HQQ (Badri and Shaji, 2023) with its sparse error term left out and the least-squares scale
    taken in. Scale and zero are rounded to float16 before the last codes are chosen.

    Shapes: x [..., group] float32, to codes [..., group] (whole numbers as float32, 0 to `levels`),
    scale [..., 1] float16, zero [..., 1] float16.
    """
    low = x.amin(-1, keepdim=True)
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    scale = (x.amax(-1, keepdim=True) - low) / levels
    zero = low
    for _ in range(ROUNDS):
        codes = _nearest_code(x, scale, zero, levels)
        code_mean = codes.mean(-1, keepdim=True)
        code_centred = codes - code_mean
        spread = (code_centred * code_centred).sum(-1, keepdim=True)
        slope = (code_centred * centred).sum(-1, keepdim=True) / spread.clamp_min(1e-6)
        scale = torch.where(spread > 0, slope, scale)
        zero = mean - scale * code_mean
    stored_scale = scale.to(torch.float16)
    stored_zero = (mean - stored_scale.to(x.dtype) * code_mean).to(torch.float16)
    codes = _nearest_code(x, stored_scale.to(x.dtype), stored_zero.to(x.dtype), levels)
    return codes, stored_scale, stored_zero


def _nearest_code(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
) -> torch.Tensor:
    inverse = torch.where(scale > TINY, 1.0 / scale, torch.zeros_like(scale))
    return ((x - zero) * inverse).round().clamp(0, levels)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 4, 2 or 1 bit, n = 8 / bits of them a byte.

    Bits `bits * i` and up of byte `4 k + j` hold channel `4 n k + 4 i + j` (0 <= j < 4), so that
    after a shift and a mask four bytes are four neighbouring channels.

    Shapes: [T, rank] whole numbers below 2^bits, to [T, rank / n] uint8.
    """
    count = 8 // bits
    tokens, rank = codes.shape
    pieces = codes.reshape(tokens, rank // (4 * count), count, 4)
    packed = pieces[:, :, 0]
    for place in range(1, count):
        packed = packed + pieces[:, :, place] * 2 ** (bits * place)
    return packed.to(torch.uint8).reshape(tokens, rank // count)


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_codes`. Shapes: [B, T, rank / n] uint8, to [B, T, rank] uint8."""
    count = 8 // bits
    batch, tokens, width = packed.shape
    quads = packed.reshape(batch, tokens, width // 4, 4)
    pieces = [quads & (2**bits - 1)]
    for place in range(1, count):
        shifted = quads >> (bits * place)
        pieces.append(shifted if place == count - 1 else shifted & (2**bits - 1))
    return torch.stack(pieces, dim=3).reshape(batch, tokens, count * width)


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


def encode_fp8(x: torch.Tensor) -> torch.Tensor:
    """The nearest number of E4M3 (OCP FP8, finite: up to 448), ties to even, as its byte.

    By arithmetic, because float8 arrays cannot be gathered and scattered by standard operators.

    Shapes: x float32, to the same in uint8.
    """
    size = x.abs().clamp(0, FP8_LARGEST)
    binade = torch.zeros_like(x)  # above that of the subnormals
    ulp = torch.zeros_like(x) + 2.0**-9
    for exponent in FP8_BINADES:
        is_below = size < 2.0**exponent
        binade = torch.where(is_below, binade, binade + 1)
        ulp = torch.where(is_below, ulp, ulp + ulp)
    # A mantissa that is rounded up to the next power of two carries into the exponent by itself.
    code = binade * 8 + (size / ulp).round()
    return torch.where(x < 0, code + 128, code).to(torch.uint8)


def decode_fp8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `encode_fp8`. Shapes: uint8, to the same in `dtype`."""
    exponent = (codes >> 3) & 15
    mantissa = (codes & 7).to(dtype)
    is_subnormal = exponent.to(dtype) < 1
    value = torch.where(is_subnormal, mantissa + mantissa, mantissa + 8) * 2.0**-10
    for bit in range(4):  # times 2^exponent, without a power function
        is_set = ((exponent >> bit) & 1).to(dtype)
        value = value * (is_set * (2.0 ** (2**bit) - 1) + 1)
    return value * ((codes >> 7).to(dtype) * -2 + 1)
