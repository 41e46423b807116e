"""The cache of a TensorRT engine: rows a token, for one session at a time in GPU memory.

Every part of every layer is [tokens, width], the layers of a part behind each other, so that the
rows of new tokens, which the engine writes to a staging area of the same form, go to their place in
one strided copy a part:

    arena of a part    [layers, capacity, width]
    staging of a part  [layers, chunk, width], each layer at a multiple of 256 bytes, as TensorRT
                       wants addresses; that is also why it does not write into the arena itself
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mla_deploy.errors import SessionError
from mla_deploy.manifest import CacheInfo
from mla_deploy.runtime.tensorrt_cache import Device, Place

ALIGNMENT = 256
"""Of addresses given to TensorRT."""


@dataclass(frozen=True)
class _Part:
    """One part of the cache in all layers that have it."""

    name: str
    width: int
    row_bytes: int
    layers: tuple[int, ...]
    arena: int
    arena_pitch: int
    staging: int
    staging_pitch: int


class RowCache:
    """Arena and staging area of all parts.

    Attributes:
        bytes_per_token: in all layers.
    """

    def __init__(self, device: Device, cache: CacheInfo, capacity: int, chunk: int) -> None:
        """
        Args:
            capacity: rows of the arena.
            chunk: new rows of a step at most.
        """
        self._device, self._page, self._capacity = device, cache.page_tokens, capacity
        self._taken = False
        layers: dict[tuple[str, int, int], list[int]] = {}
        for index, layer in enumerate(cache.layers):
            for part in layer.parts:
                width = math.prod(part.page_shape[1:])
                row_bytes = width * np.dtype(part.dtype).itemsize
                layers.setdefault((part.name, width, row_bytes), []).append(index)
        self._parts = [
            self._part(name, width, row_bytes, tuple(where), capacity, chunk)
            for (name, width, row_bytes), where in layers.items()
        ]
        self.bytes_per_token = sum(part.row_bytes * len(part.layers) for part in self._parts)

    def _part(
        self,
        name: str,
        width: int,
        row_bytes: int,
        layers: tuple[int, ...],
        capacity: int,
        chunk: int,
    ) -> _Part:
        arena_pitch, staging_pitch = (_aligned(rows * row_bytes) for rows in (capacity, chunk))
        return _Part(
            name=name,
            width=width,
            row_bytes=row_bytes,
            layers=layers,
            arena=self._device.allocate(arena_pitch * len(layers)),
            arena_pitch=arena_pitch,
            staging=self._device.allocate(staging_pitch * len(layers)),
            staging_pitch=staging_pitch,
        )

    def addresses(self) -> dict[str, int]:
        """Where the engine reads and writes, by the names of its inputs and outputs."""
        found = {}
        for part in self._parts:
            for line, layer in enumerate(part.layers):
                found[f"cache.{layer}.{part.name}"] = part.arena + line * part.arena_pitch
                found[f"new.{layer}.{part.name}"] = part.staging + line * part.staging_pitch
        return found

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the engine's cache inputs, with rows for so many tokens."""
        rows = -(-tokens // self._page) * self._page  # whole pages, so that shapes seldom change
        return {
            f"cache.{layer}.{part.name}": (1, rows, part.width)
            for part in self._parts
            for layer in part.layers
        }

    @property
    def free_tokens(self) -> int:
        """All while there is no session."""
        return 0 if self._taken else self._capacity

    @property
    def free(self) -> int:
        """Rows: those behind the session's tokens are free whatever they hold."""
        return self._capacity

    def open(self) -> Place:
        """The only place; SessionError while it is taken."""
        if self._taken:
            raise SessionError(
                "an engine without the plugin has one session at a time",
                hint="close the other first, or export with --plugin",
            )
        self._taken = True
        return Place()

    def fork(self, place: Place) -> Place:
        """Raises a SessionError."""
        return self.open()

    def trim(self, place: Place, length: int) -> None:
        """Nothing."""

    def close(self, place: Place) -> None:
        """Give the place back."""
        self._taken = False

    def room(self, place: Place, length: int) -> int:
        """Tokens that can be added behind the first `length`."""
        return self._capacity - length

    def needed(self, place: Place, length: int, count: int) -> int:
        """Rows of all tokens."""
        return length + count

    def before_step(self, place: Place, past: int, count: int) -> None:
        """Nothing: the engine gives the rows of as many tokens as it is given."""

    def after_step(self, place: Place, past: int, count: int) -> None:
        """Copy the first `count` rows of the staging area behind the first `past` of the arena."""
        for part in self._parts:
            self._device.copy_rows(
                part.arena + past * part.row_bytes,
                part.arena_pitch,
                part.staging,
                part.staging_pitch,
                count * part.row_bytes,
                len(part.layers),
            )

    def repeat(self, place: Place, whole: int, length: int) -> None:
        """Fill up to `length` rows with copies of the first `whole`."""
        for part in self._parts:
            for start in range(whole, length, whole):
                self._device.copy_rows(
                    part.arena + start * part.row_bytes,
                    part.arena_pitch,
                    part.arena,
                    part.arena_pitch,
                    min(whole, length - start) * part.row_bytes,
                    len(part.layers),
                )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
