"""Matrices to codes, scales and zeros in the layout of `mla_deploy.packing`.

The work is cut into blocks of rows that fit into a core's cache, so that memory is bounded whatever
the matrix, and the blocks are shared among threads.
"""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mla_deploy.errors import UsageError
from mla_deploy.packing import CODES, SCALES, ZEROS, pack
from mla_deploy.quant.hqq import solve
from mla_deploy.recipe import WeightFormat

GROUPS = (32, 64, 128)
_BLOCK_VALUES = 128 << 10
"""Values a thread works on at a time: three float32 buffers of them fit into 2 MiB of cache."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [rows, in] after quantisation; `mla_deploy.packing` has the shapes."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    squared_error: float
    """Sum over the matrix."""
    squared_sum: float
    """Of the original weights: `squared_error / squared_sum` is the relative error (NMSE)."""

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Named as in a checkpoint, for the module of that name."""
        return {
            f"{name}.{CODES}": self.codes,
            f"{name}.{SCALES}": self.scales,
            f"{name}.{ZEROS}": self.zeros,
        }


def quantize_matrix(matrix: torch.Tensor, weight_format: WeightFormat) -> QuantizedMatrix:
    """Quantise along the last axis.

    Shapes: matrix [rows, in], of any float type.

    Raises:
        UsageError: the group does not divide `in`.
        CheckpointError: values that are too large.
    """
    rows, columns = matrix.shape
    check_group(weight_format.group, columns)
    bits, groups = weight_format.bits, columns // weight_format.group
    codes = torch.empty((rows, columns * bits // 8), dtype=torch.uint8)
    scales = torch.empty((rows, groups), dtype=torch.float16)
    is_whole = weight_format.zeros == "integer"
    zeros = torch.empty((rows, groups), dtype=torch.uint8 if is_whole else torch.float16)

    def quantize_rows(start: int, end: int) -> tuple[float, float]:
        x = matrix[start:end].float().reshape(-1, weight_format.group)
        solved = solve(x, bits, weight_format.zeros)
        codes[start:end] = pack(solved.codes.reshape(end - start, columns), bits)
        scales[start:end] = solved.scale.reshape(end - start, groups)
        zeros[start:end] = solved.zero.reshape(end - start, groups)
        squared_sum = torch.linalg.vecdot(x, x).sum(dtype=torch.float64)
        return float(solved.squared_error.sum(dtype=torch.float64)), float(squared_sum)

    step = max(1, _BLOCK_VALUES // columns)
    starts = range(0, rows, step)
    ends = [min(start + step, rows) for start in starts]
    sums = list(_workers(torch.get_num_threads()).map(quantize_rows, starts, ends))
    squared_error, squared_sum = (sum(part) for part in zip(*sums, strict=True))
    return QuantizedMatrix(codes, scales, zeros, squared_error, squared_sum)


def check_group(group: int, columns: int, name: str = "a matrix") -> None:
    """Raise a UsageError that says which groups would do, if this one does not divide `in`."""
    if columns % group == 0:
        return
    possible = possible_groups(columns)
    raise UsageError(
        f"{name} has {columns} inputs, which groups of {group} do not divide",
        found=f"group {group}",
        allowed=", ".join(map(str, possible)) or "none: these inputs fit no group",
        hint=f"use --group {possible[-1]}" if possible else "keep it in floating point",
    )


def possible_groups(columns: int) -> tuple[int, ...]:
    """The groups that divide so many inputs, smallest first."""
    return tuple(group for group in GROUPS if columns % group == 0)


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads in which each torch operation runs on one core.

    Sharing out blocks beats sharing out each operation: many small operations would meet at a
    barrier each, and on a busy machine a barrier waits for the slowest.
    """

    def use_one_core() -> None:
        torch.set_num_threads(1)  # of this thread, and the default of threads yet to come
        torch.get_num_threads()  # makes this thread take it before the default is set back

    pool = ThreadPoolExecutor(threads, "quantize", use_one_core)
    ready = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(ready.wait)
    ready.wait()
    torch.set_num_threads(threads)
    return pool
