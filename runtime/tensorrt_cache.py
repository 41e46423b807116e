"""What an engine's cache is to the runner: memory of the GPU, and a place a session."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


class Device(Protocol):
    """Memory of the GPU, and a stream on which all work is done in order."""

    stream: int

    def allocate(self, size: int) -> int:
        """The address of so many bytes, zeroed. Freed with the device."""

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to the GPU."""

    def download(self, address: int, array: Array) -> None:
        """Copy from the GPU into an array, and wait for all work before it."""

    def copy_rows(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Copy `height` lines of `width` bytes, on the GPU."""

    def close(self) -> None:
        """Free everything."""


class Place:
    """What a session has of a cache."""


class Cache(Protocol):
    """The cache of an engine's sessions."""

    bytes_per_token: int

    @property
    def free_tokens(self) -> int:
        """Tokens of room that no session uses."""

    @property
    def free(self) -> int:
        """What `needed` counts, as far as no session has it."""

    def addresses(self) -> dict[str, int]:
        """Where the engine reads and writes, by the names of its inputs and outputs."""

    def open(self) -> Place:
        """A place without tokens; SessionError if there is none."""

    def fork(self, place: Place) -> Place:
        """Another place with the same tokens; SessionError if there is none."""

    def trim(self, place: Place, length: int) -> None:
        """Give back what lies behind the first `length` tokens."""

    def close(self, place: Place) -> None:
        """Give the place back."""

    def room(self, place: Place, length: int) -> int:
        """Tokens that can be added behind the first `length`."""

    def needed(self, place: Place, length: int, count: int) -> int:
        """How much of `free` so many tokens take behind the first `length`."""

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the engine's inputs when a session has so many tokens, new ones included."""

    def before_step(self, place: Place, past: int, count: int) -> None:
        """So many new tokens are about to be computed, behind the first `past`."""

    def after_step(self, place: Place, past: int, count: int) -> None:
        """They were."""

    def repeat(self, place: Place, whole: int, length: int) -> None:
        """Fill a place up to `length` tokens with copies of the first `whole`."""
