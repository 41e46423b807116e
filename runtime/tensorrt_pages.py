"""The cache of an engine with the plugin: pages of the record in GPU memory, shared by sessions.

Every part of every layer is an arena [pages, *page_shape], input and output of the engine at once:
the kernels write new tokens where they belong, and nothing is copied. A session has a list of
pages; forks share them, until one of them writes into a page: then it gets a copy of that page.
Page 0 is the scratch page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from mla_deploy.errors import SessionError
from mla_deploy.manifest import CacheInfo
from mla_deploy.runtime.tensorrt_cache import Device, Place


@dataclass(eq=False)
class Pages(Place):
    """Pages of a session, in the order of its tokens."""

    pages: list[int] = field(default_factory=list)


class PageCache:
    """Arenas of all parts, and which session has which page; `tensorrt_cache.Cache`.

    Attributes:
        bytes_per_token: in all layers.
    """

    def __init__(self, device: Device, cache: CacheInfo, capacity: int) -> None:
        """
        Args:
            capacity: tokens of all sessions together, whole pages.
        """
        self._device, self._page = device, cache.page_tokens
        pages = capacity // cache.page_tokens + 1
        parts = {
            f"{layer}.{part.name}": part
            for layer, info in enumerate(cache.layers)
            for part in info.parts
        }
        self._shapes = {f"cache.{name}": (pages, *part.page_shape) for name, part in parts.items()}
        self._page_bytes = {
            name: math.prod(part.page_shape) * np.dtype(part.dtype).itemsize
            for name, part in parts.items()
        }
        self._arenas = {
            name: device.allocate(pages * size) for name, size in self._page_bytes.items()
        }
        self.bytes_per_token = sum(self._page_bytes.values()) // self._page
        self._table = device.allocate(8 * pages)
        self._new = device.allocate(8)
        self._free = list(range(pages - 1, 0, -1))
        self._users = [0] * pages

    def addresses(self) -> dict[str, int]:
        """Where the engine reads and writes, by the names of its inputs and outputs."""
        found = {"block_table": self._table, "new_lengths": self._new}
        for name, arena in self._arenas.items():
            found[f"cache.{name}"] = found[f"present.{name}"] = arena
        return found

    # ---- sessions ----

    def open(self) -> Pages:
        """A place without tokens."""
        return Pages()

    def fork(self, place: Place) -> Pages:
        """Another place with the same tokens."""
        assert isinstance(place, Pages)
        for page in place.pages:
            self._users[page] += 1
        return Pages(list(place.pages))

    def trim(self, place: Place, length: int) -> None:
        """Give back what lies behind the first `length` tokens."""
        assert isinstance(place, Pages)
        kept = self._pages_for(length)
        for page in place.pages[kept:]:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        del place.pages[kept:]

    def close(self, place: Place) -> None:
        """Give all of its pages back."""
        self.trim(place, 0)

    def room(self, place: Place, length: int) -> int:
        """Tokens that can be added behind the first `length`."""
        assert isinstance(place, Pages)
        free = len(self._free) - self._must_copy(place, length)
        if free < 0:
            return 0
        return (len(place.pages) + free) * self._page - length

    def needed(self, place: Place, length: int, count: int) -> int:
        """Pages that `count` tokens more take."""
        assert isinstance(place, Pages)
        more = self._pages_for(length + count) - len(place.pages)
        return max(0, more) + self._must_copy(place, length)

    @property
    def free_tokens(self) -> int:
        """In pages that no session has."""
        return len(self._free) * self._page

    @property
    def free(self) -> int:
        """Pages that no session has."""
        return len(self._free)

    def _must_copy(self, place: Pages, length: int) -> bool:
        """Whether the next token goes to a page that others have too."""
        at = length // self._page
        return at < len(place.pages) and self._users[place.pages[at]] > 1

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page)

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _copy(self, to: int, source: int) -> None:
        for name, arena in self._arenas.items():
            size = self._page_bytes[name]
            self._device.copy_rows(arena + to * size, size, arena + source * size, size, size, 1)

    # ---- steps ----

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the engine's inputs when a session has so many tokens."""
        return {"block_table": (1, self._pages_for(tokens)), "new_lengths": (1,), **self._shapes}

    def before_step(self, place: Place, past: int, count: int) -> None:
        """Take pages for new tokens, and tell the engine which and how many."""
        assert isinstance(place, Pages)
        if self._must_copy(place, past):
            at = past // self._page
            shared, place.pages[at] = place.pages[at], self._take()
            self._users[shared] -= 1
            self._copy(place.pages[at], shared)
        self._grow(place, past + count)
        self._device.upload(self._table, np.array(place.pages, dtype=np.int64))
        self._device.upload(self._new, np.array([count], dtype=np.int64))

    def _grow(self, place: Pages, tokens: int) -> None:
        while len(place.pages) < self._pages_for(tokens):
            place.pages.append(self._take())

    def after_step(self, place: Place, past: int, count: int) -> None:
        """Nothing: the engine has written the tokens where they belong."""

    def repeat(self, place: Place, whole: int, length: int) -> None:
        """Fill up to `length` tokens with copies of the whole pages among the first `whole`.

        Raises:
            SessionError: there is no whole page.
        """
        assert isinstance(place, Pages)
        have = whole // self._page
        if not have:
            raise SessionError(
                "the cache is filled with copies of whole pages",
                found=f"{whole} tokens",
                allowed=f"{self._page} or more",
                hint="prefill more tokens first",
            )
        self.trim(place, have * self._page)
        self._grow(place, length)
        for at in range(have, len(place.pages)):
            self._copy(place.pages[at], place.pages[at % have])
