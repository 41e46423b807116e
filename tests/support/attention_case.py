"""Latent attention as a case: inputs, a cache with a past, and oracles in float64.

Two oracles tell two errors apart: one reads the original latents (its distance is mostly the
cache's quantisation), one the cache's own content, decoded (its distance is the kernel's alone).
Queries are scaled so that attention is far from uniform, or a test would be blind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mla_deploy.cache import CacheRecord, cache_record
from mla_deploy.manifest import PAGE_TOKENS
from mla_deploy.ops import attention

EXPONENT = 2.5  # standard deviation of the scores
EPSILON = 1e-6


@dataclass(frozen=True)
class Dims:
    heads: int = 16
    nope: int = 128
    rank: int = 512
    rope: int = 64
    v: int = 128


@dataclass(frozen=True)
class Error:
    """Distance of two arrays of rows."""

    max_abs: float
    relative: float
    cosine: float  # the smallest over the rows
    worst: tuple[int, ...]

    @classmethod
    def of(cls, found: torch.Tensor, expected: torch.Tensor) -> Error:
        found = found.double()
        gap = (found - expected).abs()
        worst = np.unravel_index(int(gap.argmax()), tuple(gap.shape))
        size = expected.norm(dim=-1)
        pointing = size > 1e-5 * size.max()  # a row of zeros has no direction
        cosine = torch.cosine_similarity(found[pointing], expected[pointing], dim=-1)
        return cls(
            max_abs=float(gap.max()),
            relative=float((found - expected).norm() / expected.norm()),
            cosine=float(cosine.min()),
            worst=tuple(int(i) for i in worst),
        )

    def __str__(self) -> str:
        return (
            f"max-abs {self.max_abs:.2e}, relative {self.relative:.2e}, "
            f"1 - cosine {1 - self.cosine:.2e}, worst at {self.worst}"
        )


class AttentionCase:
    """B sequences with a past in the cache and new tokens to append."""

    def __init__(
        self,
        past: list[int],
        new: list[int],
        *,
        dims: Dims | None = None,
        cache_format: str = "int4",
        norm: bool = True,
    ) -> None:
        self.dims = d = dims or Dims()
        self.cache_format = cache_format
        self.epsilon = EPSILON if norm else -1.0
        self.past, self.new = torch.tensor(past), torch.tensor(new)
        self.scale = (d.nope + d.rope) ** -0.5
        self.batch, self.steps = len(past), max(new)
        width = max(p + n for p, n in zip(past, new, strict=True))
        kv = torch.randn(self.batch, width, d.rank + d.rope)
        kv[..., : d.rank] *= 0.5 + 2 * torch.rand(d.rank)  # channels of unequal weight
        kv[..., :3] *= 4
        q = torch.randn(self.batch, self.steps, d.heads, d.nope + d.rope) * EXPONENT
        self.q = q.flatten(2)
        angle = torch.rand(self.batch, width, d.rope // 2) * 6.28
        self.all_kv, self.all_cos, self.all_sin = kv, angle.cos(), angle.sin()
        # bf16 values, so that the weights' own rounding is not counted
        self.w_uk = (torch.randn(d.heads, d.nope, d.rank) * d.rank**-0.5).bfloat16().float()
        self.w_uv = (torch.randn(d.heads, d.rank, d.v) * d.rank**-0.5).bfloat16().float()
        self.pages = -(-width // PAGE_TOKENS)
        order = torch.randperm(self.batch * self.pages) + 1  # never the identity, never page 0
        self.block_table = order.reshape(self.batch, self.pages)
        self.cache = self._past_cache()

    @property
    def record(self) -> CacheRecord:
        return cache_record(self.cache_format)

    def _latents(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return attention.new_latents(
            self.all_kv.to(dtype),
            self.all_cos.to(dtype),
            self.all_sin.to(dtype),
            self.dims.rank,
            self.epsilon,
        )

    def _past_cache(self) -> list[torch.Tensor]:
        parts = self.record.parts(self.dims.rank, self.dims.rope)
        empty = [part.empty(self.batch * self.pages + 1) for part in parts]
        if not int(self.past.max()):
            return empty
        c_kv, k_pe = self._latents(torch.float32)
        longest = int(self.past.max())
        return attention.append(
            c_kv[:, :longest],
            k_pe[:, :longest],
            self.block_table,
            torch.zeros_like(self.past),
            self.past,
            empty,
            self.record,
        )

    def new_inputs(self) -> list[torch.Tensor]:
        """q, kv, cos, sin of the new tokens, padding included."""
        steps = self.past.unsqueeze(1) + torch.arange(self.steps)
        rows = steps.clamp_max(self.all_kv.shape[1] - 1)
        batch = torch.arange(self.batch).unsqueeze(1)
        gathered = [x[batch, rows] for x in (self.all_kv, self.all_cos, self.all_sin)]
        return [self.q, *gathered]

    def real(self, output: torch.Tensor) -> torch.Tensor:
        """The heads' outputs of the tokens that are not padding: [tokens * H, V]."""
        is_real = torch.arange(self.steps) < self.new.unsqueeze(1)
        return output[is_real].reshape(-1, self.dims.v)

    def oracle(self, cache: list[torch.Tensor] | None) -> torch.Tensor:
        """float64 attention on what the cache holds; None: on the original latents."""
        d = self.dims
        q, _, cos, sin = (x.double() for x in self.new_inputs())
        if cache is None:
            c_kv, k_pe = self._latents(torch.float64)
        else:
            c_kv, k_pe = attention.read(
                self.block_table, cache, self.record, d.rank, d.rope, torch.float64
            )
        q_nope, q_pe = attention.new_queries(q, cos, sin, d.heads, d.nope)
        output = attention.attend_absorbed(
            q_nope,
            q_pe,
            c_kv,
            k_pe,
            self.w_uk.double(),
            self.w_uv.double(),
            self.past,
            self.scale,
        )
        return self.real(output)

    def errors(
        self, output: torch.Tensor, cache: list[torch.Tensor], title: str
    ) -> tuple[Error, Error, Error]:
        """The kernel's own error, that of the cache's quantisation, and both; printed too."""
        found, exact, stored = self.real(output), self.oracle(None), self.oracle(cache)
        kernel, total = Error.of(found, stored), Error.of(found, exact)
        cache_alone = Error.of(stored, exact)
        print(title)
        print(f"  kernel error       {kernel}")
        print(f"  quantisation error {cache_alone}")
        print(f"  both               {total}")
        return kernel, cache_alone, total
