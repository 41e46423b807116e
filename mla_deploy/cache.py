"""The latent cache as an interface: parts, page layouts, records.

A *record* says what one token leaves in the cache: a handful of typed *parts*. Parts live in an
arena of pages of `PAGE_TOKENS` tokens that all sequences share; a block table names the pages of
each sequence. Page 0 is the scratch page: padded tokens are written there and nobody reads it.
Arenas start zero-filled, so that whatever a mask hides is finite.

The records themselves are in `mla_deploy.quant.latent_cache`; they are found through the entry
point group `mla_deploy.cache_records`, so that another package can bring its own.
"""

from __future__ import annotations

import abc
import enum
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from mla_deploy.errors import ConfigError
from mla_deploy.manifest import PAGE_TOKENS

BLOCK_TOKENS = 16
ENTRY_POINT_GROUP = "mla_deploy.cache_records"


class Layout(enum.Enum):
    """How the values of a page's 64 tokens are arranged; `width` is the values per token."""

    BLOCKED = "blocked"
    """[4, width / 4, 16, 4]: 16 tokens side by side, 4 values each, one 64-byte line for 1-byte
    types. What `vpdpbusd`, `tdpbusd`, `sdot` and `dp4a` want beside a broadcast query."""

    COLUMNS = "columns"
    """[width, 64]: one value of 64 tokens side by side, for per-group scales."""

    ROWS = "rows"
    """[64, width]: token after token."""


@dataclass(frozen=True)
class CachePart:
    """One typed array of the cache: [pages, *page_shape]."""

    name: str
    dtype: torch.dtype
    layout: Layout
    width: int
    """Values per token."""

    @property
    def page_shape(self) -> tuple[int, ...]:
        if self.layout is Layout.BLOCKED:
            return (PAGE_TOKENS // BLOCK_TOKENS, self.width // 4, BLOCK_TOKENS, 4)
        if self.layout is Layout.COLUMNS:
            return (self.width, PAGE_TOKENS)
        return (PAGE_TOKENS, self.width)

    @property
    def bytes_per_token(self) -> int:
        return self.width * self.dtype.itemsize

    def empty(self, pages: int, device: torch.device | None = None) -> torch.Tensor:
        """A zero-filled arena of `pages` pages: [pages, *page_shape]."""
        return torch.zeros((pages, *self.page_shape), dtype=self.dtype, device=device)

    def write(
        self, arena: torch.Tensor, page: torch.Tensor, slot: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """The arena with `values` [T, width] stored at token `slot` [T] of page `page` [T]."""
        if self.layout is Layout.ROWS:
            return arena.index_put((page, slot), values)
        column = torch.arange(self.page_shape[self._column_axis], device=page.device).unsqueeze(0)
        page, slot = page.unsqueeze(1), slot.unsqueeze(1)
        if self.layout is Layout.COLUMNS:
            return arena.index_put((page, column, slot), values)
        index = (page, slot // BLOCK_TOKENS, column, slot % BLOCK_TOKENS)
        return arena.index_put(index, values.reshape(-1, self.width // 4, 4))

    def read(self, arena: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
        """All tokens of the pages in `block_table` [B, M]: [B, M * 64, width]."""
        batch, pages = block_table.shape
        found = arena[block_table]  # [B, M, *page_shape]
        if self.layout is Layout.BLOCKED:
            found = found.permute(0, 1, 2, 4, 3, 5)  # [B, M, 4, 16, width / 4, 4]
        elif self.layout is Layout.COLUMNS:
            found = found.permute(0, 1, 3, 2)
        return found.reshape(batch, pages * PAGE_TOKENS, self.width)

    @property
    def _column_axis(self) -> int:
        return 1 if self.layout is Layout.BLOCKED else 0


class CacheRecord(abc.ABC):
    """What one token leaves in the cache of one layer, and how it is read back."""

    name: str

    @abc.abstractmethod
    def parts(self, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[CachePart, ...]:
        """The typed arrays, in the order of every list of cache tensors in this project.

        Raises:
            ConfigError: the record cannot hold a latent or rope key of this size.
        """

    @abc.abstractmethod
    def encode(self, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
        """Quantise tokens, each for itself.

        Shapes: c_kv [T, kv_lora_rank], k_pe [T, qk_rope_head_dim], to one [T, width] a part.
        """

    @abc.abstractmethod
    def decode(
        self, values: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes: one [..., width] a part, to c_kv [..., kv_lora_rank], k_pe [..., rope]."""

    def bytes_per_token(self, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
        """Bytes of cache for one token in one layer, scales and zeros included."""
        return sum(p.bytes_per_token for p in self.parts(kv_lora_rank, qk_rope_head_dim))


@functools.cache
def cache_formats() -> tuple[str, ...]:
    """The names of all installed records."""
    return tuple(sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP)))


@functools.cache
def cache_record(name: str) -> CacheRecord:
    """The record of that name.

    Raises:
        ConfigError: no installed package brings it.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            record: CacheRecord = point.load()
            return record
    raise ConfigError(
        "unknown cache format", found=name, allowed=", ".join(cache_formats()) or "none installed"
    )


def formats_of_layers(layers: int, kv: str = "int4", first: str | None = None) -> tuple[str, ...]:
    """The record of each of so many layers, as `quantize` gives them.

    Args:
        kv: the record of all layers but the first.
        first: the record of the first layer. By default a cache of 4 bits has `int8` there: first
            layers have heads that look at one or few tokens, so that rounding errors do not
            average, and all that follows is built on them. A model of one layer has nothing that
            follows, and keeps `kv`.
    """
    if first is None:
        first = "int8" if kv in ("int4", "int4-g32") and layers > 1 else kv
    return (first, *[kv] * (layers - 1))


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return math.ceil(tokens / PAGE_TOKENS)
