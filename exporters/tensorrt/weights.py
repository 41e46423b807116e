"""Quantised matrices as TensorRT wants them: signed 4-bit planes, inputs before outputs.

TensorRT's blockwise DequantizeLinear is symmetric and takes INT4. What the checkpoint holds,
`w = (code - zero) * scale` with unsigned codes, is split exactly into that and a correction:

- 4 bit: `w = (code - 8) * scale + (8 - zero) * scale`;
- 8 bit: `code = 16 high + low`, two planes of 4 bit below each other:
  `w = (high - 8) * 16 scale + (low - 8) * scale + (136 - zero) * scale`.

The correction is constant along a group of inputs, so its product is one with the group sums of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mla_deploy.exporters.onnx.builder import Chunks
from mla_deploy.exporters.onnx.translate import Weight
from mla_deploy.packing import unpack
from mla_deploy.sources import Read

Arrange = Callable[[torch.Tensor], torch.Tensor]
"""Puts the rows of a slab [..., rows, columns] into the order wanted."""


def as_stored(slab: torch.Tensor) -> torch.Tensor:
    """Rows as they are."""
    return slab


def gate_then_up(slab: torch.Tensor) -> torch.Tensor:
    """Interleaved rows (g0, u0, g1, u1, ...) as all of gate, then all of up."""
    return slab.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [out, in], or a stack of them [experts, out, in], in `mla_deploy.packing`'s form."""

    codes: Weight
    scales: Weight
    zeros: Weight
    bits: int
    arrange: Arrange = as_stored

    @property
    def planes(self) -> int:
        """INT4 matrices below each other."""
        return self.bits // 4

    @property
    def columns(self) -> int:
        """Inputs of the matrix."""
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def groups(self) -> int:
        """Groups of inputs."""
        return self.scales.shape[-1]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.columns // self.groups

    def shape(self, inputs: int) -> tuple[int, ...]:
        """Shape with so many inputs: [..., inputs, out]."""
        return (*self.codes.shape[:-2], inputs, self.codes.shape[-2])

    def code_chunks(self, read: Read) -> Iterator[torch.Tensor]:
        """[..., planes * in, out] INT4, two a byte, the earlier in the low nibble."""
        for (codes,) in self._slabs(read, self.codes):
            planes = _planes(unpack(codes, self.bits), self.bits)
            yield pack_int4(torch.cat([_transposed(plane) for plane in planes], -2))

    def scale_chunks(self, dtype: torch.dtype) -> Chunks:
        """[..., planes * groups, out]."""

        def chunks(read: Read) -> Iterator[torch.Tensor]:
            for (scales,) in self._slabs(read, self.scales):
                s = _transposed(scales.float())
                yield torch.cat([s * step for step in _steps(self.bits)], -2).to(dtype)

        return chunks

    def correction_chunks(self, dtype: torch.dtype) -> Chunks:
        """What a group of inputs adds, besides the planes: [..., groups, out]."""
        middle = 8 * sum(_steps(self.bits))

        def chunks(read: Read) -> Iterator[torch.Tensor]:
            for scales, zeros in self._slabs(read, self.scales, self.zeros):
                yield _transposed((middle - zeros.float()) * scales.float()).to(dtype)

        return chunks

    def _slabs(self, read: Read, *weights: Weight) -> Iterator[tuple[torch.Tensor, ...]]:
        """Slabs of experts, or the matrix whole: it is turned round."""
        is_stack = len(self.codes.shape) == 3
        several = [weight.source.slabs(read) for weight in weights]
        if is_stack:
            for slabs in zip(*several, strict=True):
                yield tuple(self.arrange(slab) for slab in slabs)
        else:
            yield tuple(self.arrange(torch.cat(list(slabs))) for slabs in several)


def table_code_chunks(codes: Weight, bits: int, plane: int) -> Chunks:
    """One plane of a table [rows, in], not turned round, as INT4."""

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        for slab in codes.source.slabs(read):
            yield pack_int4(_planes(unpack(slab, bits), bits)[plane])

    return chunks


def table_scale_chunks(scales: Weight, bits: int, plane: int, dtype: torch.dtype) -> Chunks:
    """The scales of such a plane [rows, groups]."""

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        for slab in scales.source.slabs(read):
            yield (slab.float() * _steps(bits)[plane]).to(dtype)

    return chunks


def table_correction_chunks(scales: Weight, zeros: Weight, bits: int, dtype: torch.dtype) -> Chunks:
    """What a group adds, besides the planes: [rows, groups]."""
    middle = 8 * sum(_steps(bits))

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        pairs = zip(scales.source.slabs(read), zeros.source.slabs(read), strict=True)
        for scale, zero in pairs:
            yield ((middle - zero.float()) * scale.float()).to(dtype)

    return chunks


def dense_chunks(weight: Weight, arrange: Arrange) -> Chunks:
    """A float stack [experts, out, in] as [experts, in, out]."""

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        for slab in weight.source.slabs(read):
            yield _transposed(arrange(slab.to(weight.dtype)))

    return chunks


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Unsigned codes 0 to 15 as signed ones of `code - 8`, two a byte, the earlier one low.

    Shapes: an even number of uint8, to half as many [n / 2].
    """
    signed = codes.flatten() ^ 8  # two's complement in a nibble
    return signed[0::2] | (signed[1::2] << 4)


def _planes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    return [codes] if bits == 4 else [codes >> 4, codes & 15]


def _steps(bits: int) -> tuple[float, ...]:
    """What one step of each plane's codes is worth, in scales."""
    return (1.0,) if bits == 4 else (16.0, 1.0)


def _transposed(slab: torch.Tensor) -> torch.Tensor:
    return slab.transpose(-2, -1)
