"""The memory of the cache: pages of 64 tokens in arrays that all sessions share."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import CacheInfo
from mla_deploy.errors import UsageError

SCRATCH_PAGE = 0
"""Padded tokens are written there, and block tables are padded with it. Nobody relies on it."""
LINE_BYTES = 64
"""Arrays start at a cache line: 64 bytes of a page are one line, and one AVX-512 register."""

Array = npt.NDArray[np.generic]


class ArenaFullError(Exception):
    """Fewer free pages than asked for. The engine turns it into an error for the user."""


class PageArena:
    """Pages, how many sequences use each, and which are free.

    A page is the same index in every array. Pages that a fork shares are counted, and copied when
    one of their sequences writes. A page that is handed out again is zeroed first, so that nothing
    one session left (an infinity would survive a masked product) reaches another.

    Shapes: an array of `arrays` is [pages, *page_shape], its name `cache.{layer}.{part}`.

    Attributes:
        capacity_tokens: tokens that fit when all sequences fill their pages.
        page_bytes: of one page in all arrays.
    """

    def __init__(self, cache: CacheInfo, max_tokens: int) -> None:
        """Reserve memory; the system provides a page of it when it is first written.

        Raises:
            UsageError: so much memory cannot be had.
        """
        self.page_tokens: int = cache.page_tokens
        usable = -(-max_tokens // self.page_tokens)
        self._pages = usable + 1  # and the scratch page
        self.capacity_tokens = usable * self.page_tokens
        try:
            self.arrays: dict[str, Array] = {
                f"cache.{layer}.{part.name}": _zeros((self._pages, *part.page_shape), part.dtype)
                for layer, layer_cache in enumerate(cache.layers)
                for part in layer_cache.parts
            }
        except (
            MemoryError,
            ValueError,
            OverflowError,
        ):  # ValueError: larger than the address space
            raise UsageError(
                "there is not enough memory for the cache",
                found=f"{max_tokens} tokens",
                hint="load the bundle with a smaller max_tokens",
            ) from None
        self.page_bytes = sum(array.nbytes for array in self.arrays.values()) // self._pages
        self._next_fresh = SCRATCH_PAGE + 1
        self._returned: list[int] = []
        self._users: dict[int, int] = {}
        self._abandoned: deque[int] = deque()

    @property
    def free_pages(self) -> int:
        """Pages that `take` can still hand out."""
        self._collect()
        return len(self._returned) + self._pages - self._next_fresh

    def take(self, count: int) -> list[int]:
        """Hand out zeroed pages, each with one user.

        Raises:
            ArenaFullError: there are not as many; none was taken.
        """
        if count > self.free_pages:
            raise ArenaFullError
        pages = [self._take_one() for _ in range(count)]
        self._users.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more user of each page."""
        for page in pages:
            self._users[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Count one user less of each page; a page without users is free."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                self._returned.append(page)

    def abandon(self, pages: Iterable[int]) -> None:
        """`give_back` for finalisers, which run at any time in any thread: put off to `take`."""
        self._abandoned.extend(pages)

    def is_shared(self, page: int) -> bool:
        """Whether the page has more than one user."""
        return self._users[page] > 1

    def writable(self, page: int) -> int:
        """The page itself, or a copy of it if others use it too.

        Raises:
            ArenaFullError: there is no page for the copy.
        """
        if not self.is_shared(page):
            return page
        (copy,) = self.take(1)
        for array in self.arrays.values():
            array[copy] = array[page]
        self.give_back([page])
        return copy

    def _take_one(self) -> int:
        if self._returned:  # before fresh ones: its memory is there already
            page = self._returned.pop()
            for array in self.arrays.values():
                array[page] = 0
            return page
        self._next_fresh += 1
        return self._next_fresh - 1

    def _collect(self) -> None:
        while self._abandoned:
            self.give_back([self._abandoned.popleft()])


class PageTable:
    """The pages of one sequence, in order."""

    def __init__(self, arena: PageArena) -> None:
        self._arena = arena
        self.pages: list[int] = []

    def reserve(self, length: int, new_length: int) -> None:
        """Make room to write the tokens from `length` to `new_length`.

        Raises:
            ArenaFullError: there are not enough pages; what the table held, it still holds.
        """
        if length % self._arena.page_tokens:
            last = length // self._arena.page_tokens
            self.pages[last] = self._arena.writable(self.pages[last])
        self.pages += self._arena.take(self._pages_for(new_length) - len(self.pages))

    def truncate(self, length: int) -> None:
        """Give back the pages that `length` tokens do not need."""
        keep = self._pages_for(length)
        self._arena.give_back(self.pages[keep:])
        del self.pages[keep:]

    def extend_by_copies(self, length: int) -> None:
        """Grow to `length` tokens; the pages held now, all full, are copied in turn.

        Raises:
            ArenaFullError: as `reserve`.
        """
        full = len(self.pages)
        self.reserve(full * self._arena.page_tokens, length)
        for index, page in enumerate(self.pages[full:]):
            for array in self._arena.arrays.values():
                array[page] = array[self.pages[index % full]]

    def fork(self) -> PageTable:
        """Another table of the same pages."""
        table = PageTable(self._arena)
        self._arena.share(self.pages)
        table.pages = self.pages.copy()
        return table

    def abandon(self) -> None:
        """Give all pages back later; safe in a finaliser."""
        self._arena.abandon(self.pages)
        self.pages = []

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pages, those shared with other sequences included."""
        return len(self.pages) * self._arena.page_bytes

    def room(self, length: int) -> int:
        """Tokens that `reserve` finds room for after the first `length`."""
        slack = len(self.pages) * self._arena.page_tokens - length
        free = self._arena.free_pages
        if slack and self._arena.is_shared(self.pages[-1]):
            if not free:
                return 0
            free -= 1  # for the copy
        return slack + free * self._arena.page_tokens

    def _pages_for(self, length: int) -> int:
        return -(-length // self._arena.page_tokens)


def _zeros(shape: tuple[int, ...], dtype: str) -> Array:
    kind = np.dtype(dtype)
    size = int(np.prod(np.array(shape, dtype=object))) * kind.itemsize
    memory = np.zeros(size + LINE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % LINE_BYTES
    return memory[start : start + size].view(kind).reshape(shape)
