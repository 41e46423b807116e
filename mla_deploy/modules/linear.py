"""Matrices and tables, in floating point or quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mla_deploy import ops
from mla_deploy.modules.base import Block
from mla_deploy.packing import CODES, SCALES, ZEROS
from mla_deploy.recipe import WeightFormat
from mla_deploy.sources import Joined, PairedRows, Source, Stored, Zeros


@dataclass(frozen=True)
class Piece:
    """A matrix of the checkpoint [rows, in], by its name without `.weight`."""

    name: str
    rows: int
    has_bias: bool = False
    rotary_halves: tuple[int, int] | None = None
    """`block` and `rope` of `PairedRows`, where the file holds rotary rows as halves."""

    def source(self, part: str, tail: tuple[int, ...]) -> Source:
        """The tensor `NAME.PART` [rows, *tail]."""
        stored = Stored(f"{self.name}.{part}", (self.rows, *tail))
        return stored if self.rotary_halves is None else PairedRows(stored, *self.rotary_halves)


def stored_shapes(
    rows: tuple[int, ...],
    columns: int,
    weight_format: WeightFormat | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor that a matrix [*rows, columns] is stored in.

    Args:
        dtype: of the matrix where it is not quantised.
    """
    if weight_format is None:
        return {"weight": ((*rows, columns), dtype)}
    groups = columns // weight_format.group
    zeros = torch.uint8 if weight_format.zeros == "integer" else torch.float16
    return {
        CODES: ((*rows, columns * weight_format.bits // 8), torch.uint8),
        SCALES: ((*rows, groups), torch.float16),
        ZEROS: ((*rows, groups), zeros),
    }


class Linear(Block):
    """`x @ weight^T + bias` over matrices that read the same input, joined row by row.

    Shapes: x [..., in], to [..., sum of rows].
    """

    weight: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, in_features: int, pieces: tuple[Piece, ...], weight_format: WeightFormat | None
    ) -> None:
        super().__init__()
        self.weight_format = weight_format
        self.bias = None
        rows = sum(piece.rows for piece in pieces)
        for name, (tail, dtype) in stored_shapes((), in_features, weight_format).items():
            joined = Joined(tuple(piece.source(name, tail) for piece in pieces))
            self.declare(name, (rows, *tail), joined, dtype)
        if any(piece.has_bias for piece in pieces):
            del self.bias
            self.declare("bias", (rows,), Joined(tuple(_bias(piece) for piece in pieces)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight_format is None:
            return F.linear(x, self.weight, self.bias)
        return ops.linear_quantized(
            x, self.codes, self.scales, self.zeros, self.bias, self.weight_format.bits
        )


class Embedding(Block):
    """Rows of a table in float32. Shapes: ids [B, S], to [B, S, hidden]."""

    weight: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        name: str,
        weight_format: WeightFormat | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight_format = weight_format
        shapes = stored_shapes((vocab_size,), hidden_size, weight_format, dtype)
        for part, (shape, part_dtype) in shapes.items():
            self.declare(part, shape, Stored(f"{name}.{part}", shape), part_dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.weight_format is None:
            return F.embedding(ids, self.weight).float()
        return ops.embedding_quantized(
            ids, self.codes, self.scales, self.zeros, self.weight_format.bits
        )


class Norm(Block):
    """RMSNorm. Shapes: x [..., D]."""

    weight: torch.Tensor

    def __init__(self, size: int, name: str, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.declare("weight", (size,), Stored(f"{name}.weight", (size,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.epsilon)

    def after_add(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x + residual`, and that sum."""
        return ops.add_rms_norm(x, residual, self.weight, self.epsilon)


def _bias(piece: Piece) -> Source:
    return piece.source("bias", ()) if piece.has_bias else Zeros((piece.rows,))
