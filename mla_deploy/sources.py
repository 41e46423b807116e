"""Where a parameter of a reference module comes from in a checkpoint.

A parameter is often several tensors of the file joined: matrices that read the same input become
one, experts become slabs of one array. A source names those tensors with their shapes, and gives
the parameter back in slabs along its first axis, so that nobody needs it whole: the reference
loads from it, exporters stream from it, and the shapes tell what a complete checkpoint holds.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Read = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Gives the tensor of that name, which must have that shape."""


class Source(abc.ABC):
    """How to make one parameter."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors it needs, with their shapes."""

    @abc.abstractmethod
    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        """Pieces that, joined along the first axis, are the parameter."""


@dataclass(frozen=True)
class Stored(Source):
    """A tensor as it is."""

    name: str
    shape: tuple[int, ...]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        yield read(self.name, self.shape)


@dataclass(frozen=True)
class Zeros(Source):
    """A piece that the checkpoint does not have: the bias of a joined matrix without one."""

    shape: tuple[int, ...]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {}

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        yield torch.zeros(self.shape)


@dataclass(frozen=True)
class Given(Source):
    """Values that config.json holds."""

    values: tuple[float, ...]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {}

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        yield torch.tensor(self.values)


@dataclass(frozen=True)
class Joined(Source):
    """Sources under one another."""

    parts: tuple[Source, ...]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for part in self.parts for name, shape in part.tensors().items()}

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        for part in self.parts:
            yield from part.slabs(read)


@dataclass(frozen=True)
class PairedRows(Source):
    """Rows of a matrix whose rotary ones the file holds as two halves, put into pairs.

    Of each `block` rows the last `rope` are rotary: first all first ones of the pairs, then all
    second ones.
    """

    stored: Stored
    block: int
    rope: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return self.stored.tensors()

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        blocks = read(self.stored.name, self.stored.shape).unflatten(0, (-1, self.block))
        plain, halves = blocks.split((self.block - self.rope, self.rope), dim=1)
        pairs = halves.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        yield torch.cat((plain, pairs), dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Expert(Source):
    """One expert as a slab [1, rows, ...]: one tensor, or the rows of two interleaved."""

    parts: tuple[Stored, ...]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {part.name: part.shape for part in self.parts}

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        rows = [read(part.name, part.shape) for part in self.parts]
        yield torch.stack(rows, dim=1).flatten(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class UpProjection(Source):
    """w_uk or w_uv, cut out of `kv_b_proj` [H * (N + V), rank], with the latent norm's gamma."""

    kv_b_proj: Stored
    gamma: Stored | None
    heads: int
    nope: int
    is_value: bool

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {part.name: part.shape for part in (self.kv_b_proj, self.gamma) if part is not None}

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        by_head = read(self.kv_b_proj.name, self.kv_b_proj.shape).unflatten(0, (self.heads, -1))
        half = by_head[:, self.nope :] if self.is_value else by_head[:, : self.nope]
        if self.gamma is not None:
            half = half.float() * read(self.gamma.name, self.gamma.shape).float()
        yield half.transpose(1, 2) if self.is_value else half
