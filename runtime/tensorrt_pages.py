"""The cache of an engine with the plugin: pages of the record, for one session in GPU memory.

Every part of every layer is an arena [pages, *page_shape], input and output of the engine at once:
the kernels write new tokens where they belong, and nothing is copied. A sequence has the pages
1, 2, ... in this order; page 0 is the scratch page.
"""

from __future__ import annotations

import math

import numpy as np

from mla_deploy.bundle import CacheInfo
from mla_deploy.errors import SessionError
from mla_deploy.runtime.tensorrt_rows import Device


class PageCache:
    """Arenas of all parts, and what tells the engine where a sequence is; `tensorrt_rows.Cache`.

    Attributes:
        bytes_per_token: in all layers.
    """

    def __init__(self, device: Device, cache: CacheInfo, capacity: int) -> None:
        """
        Args:
            capacity: tokens of the arena, whole pages.
        """
        self._device, self._page = device, cache.page_tokens
        self._pages = capacity // cache.page_tokens + 1
        self._shapes = {
            f"{layer}.{part.name}": (self._pages, *part.page_shape)
            for layer, info in enumerate(cache.layers)
            for part in info.parts
        }
        self._page_bytes = {
            f"{layer}.{part.name}": math.prod(part.page_shape) * np.dtype(part.dtype).itemsize
            for layer, info in enumerate(cache.layers)
            for part in info.parts
        }
        self._arenas = {
            name: device.allocate(self._pages * size) for name, size in self._page_bytes.items()
        }
        self.bytes_per_token = sum(self._page_bytes.values()) // self._page
        self._table = device.allocate(8 * self._pages)
        self._new = device.allocate(8)
        device.upload(self._table, np.arange(1, self._pages, dtype=np.int64))

    def addresses(self) -> dict[str, int]:
        """Where the engine reads and writes, by the names of its inputs and outputs."""
        found = {"block_table": self._table, "new_lengths": self._new}
        for name, arena in self._arenas.items():
            found[f"cache.{name}"] = found[f"present.{name}"] = arena
        return found

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the engine's inputs when the cache holds so many tokens."""
        table = (1, -(-tokens // self._page))
        arenas = {f"cache.{name}": shape for name, shape in self._shapes.items()}
        return {"block_table": table, "new_lengths": (1,), **arenas}

    def before_step(self, count: int) -> None:
        """Tell the engine how many tokens are new."""
        self._device.upload(self._new, np.array([count], dtype=np.int64))

    def after_step(self, past: int, count: int) -> None:
        """Nothing: the engine has written the tokens where they belong."""

    def repeat(self, whole: int, length: int) -> None:
        """Fill up to `length` tokens with copies of the whole pages among the first `whole`.

        Raises:
            SessionError: there is no whole page.
        """
        have = whole // self._page
        if not have:
            raise SessionError(
                "the cache is filled with copies of whole pages",
                found=f"{whole} tokens",
                allowed=f"{self._page} or more",
                hint="prefill more tokens first",
            )
        most = -(-length // self._page)
        for name, arena in self._arenas.items():
            size = self._page_bytes[name]
            for page in range(have, most, have):
                count = min(have, most - page) * size
                to, source = arena + (1 + page) * size, arena + size
                self._device.copy_rows(to, count, source, count, count, 1)
