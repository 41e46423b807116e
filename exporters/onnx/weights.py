"""How weights are stored in an ONNX file, and the file they are streamed into.

The chunk functions turn a parameter's slabs into what an operator wants, one slab at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch

from mla_deploy.exporters.onnx.builder import Chunks, Initializer
from mla_deploy.output import writing
from mla_deploy.progress import Progress
from mla_deploy.sources import Read, Source

_PAGE = 4096
"""External data is mapped by the page; small tensors share one."""
_LINE = 64


def plain_chunks(source: Source, dtype: torch.dtype) -> Chunks:
    """The parameter in another type."""

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        for slab in source.slabs(read):
            yield slab.to(dtype)

    return chunks


def transposed_chunks(source: Source, dtype: torch.dtype) -> Chunks:
    """A matrix as [in, out]; it is held whole."""

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        yield torch.cat([slab.to(dtype) for slab in source.slabs(read)]).T

    return chunks


def packed_zero_chunks(source: Source, bits: int) -> Chunks:
    """Whole zeros [..., groups], packed along the groups as the contrib operators want them."""

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        for slab in source.slabs(read):
            yield pack_zeros(slab, bits)

    return chunks


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Shapes: [..., groups] uint8, to [..., ceil(groups * bits / 8)] uint8, low nibble first."""
    if bits == 8:
        return zeros
    padded = torch.nn.functional.pad(zeros, (0, zeros.shape[-1] % 2))
    return padded[..., 0::2] | (padded[..., 1::2] << 4)


def exact_zero_chunks(scales: Source, zeros: Source, bits: int, dtype: torch.dtype) -> Chunks:
    """`((2^(bits-1) - zero) * scale)^T` [groups, out]: what HQQ's exact zeros add to a symmetric
    product, a group sum of x at a time."""

    def chunks(read: Read) -> Iterator[torch.Tensor]:
        pairs = zip(scales.slabs(read), zeros.slabs(read), strict=True)
        middle = float(1 << (bits - 1))
        parts = [(middle - zero.float()) * scale.float() for scale, zero in pairs]
        yield torch.cat(parts).to(dtype).T

    return chunks


def write_external_data(
    initializers: list[Initializer], file: Path, read: Read, progress: Progress | None
) -> dict[str, ir.ExternalTensor]:
    """Stream all weights into one file beside the graph."""
    tensors: dict[str, ir.ExternalTensor] = {}
    total = sum(one.nbytes for one in initializers)
    done = 0
    with writing(file.parent), file.open("wb") as out:
        for one in initializers:
            boundary = _PAGE if one.nbytes >= _PAGE else _LINE
            out.write(bytes(-out.tell() % boundary))
            offset = out.tell()
            for chunk in one.chunks(read):
                out.write(chunk.contiguous().flatten().view(torch.uint8).numpy().data)
                if progress is not None:
                    progress(done + out.tell() - offset, total, one.name)
            if out.tell() - offset != one.nbytes:
                raise AssertionError(f"{one.name}: {out.tell() - offset} bytes, not {one.nbytes}")
            done += one.nbytes
            tensors[one.name] = ir.ExternalTensor(
                file.name,
                offset,
                one.nbytes,
                one.dtype,
                name=one.name,
                shape=ir.Shape(one.shape),
                base_dir=file.parent,
            )
    return tensors
