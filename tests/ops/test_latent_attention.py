"""The reference op against a naive oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_deploy import ops
from mla_deploy.cache import cache_record
from mla_deploy.errors import UsageError
from mla_deploy.manifest import PAGE_TOKENS

HEADS, NOPE, ROPE, RANK, VALUE = 4, 24, 16, 64, 20
SCALE = 0.2


class Sequences:
    """B sequences with their inputs for every position, and an arena."""

    def __init__(self, lengths: list[int], cache_format: str = "fp32") -> None:
        longest = max(lengths)
        batch = len(lengths)
        self.lengths = lengths
        self.cache_format = cache_format
        angle = torch.rand(batch, longest, ROPE // 2) * 6.28
        self.cos, self.sin = angle.cos(), angle.sin()
        self.q = torch.randn(batch, longest, HEADS * (NOPE + ROPE))
        self.kv = torch.randn(batch, longest, RANK + ROPE)
        self.w_uk = torch.randn(HEADS, NOPE, RANK) / 4  # sharp enough that order shows
        self.w_uv = torch.randn(HEADS, RANK, VALUE) / 8
        pages = -(-longest // PAGE_TOKENS)
        order = torch.randperm(batch * pages) + 1
        self.block_table = order.reshape(batch, pages)
        parts = cache_record(cache_format).parts(RANK, ROPE)
        self.cache = [part.empty(batch * pages + 1) for part in parts]

    def run(self, start: list[int], stop: list[int], mode: str = "absorbed") -> list[torch.Tensor]:
        """Append [start, stop) of each sequence; gives each one's outputs."""
        past, end = torch.tensor(start), torch.tensor(stop)
        width = int((end - past).max())
        rows = past.unsqueeze(1) + torch.arange(width)
        rows = rows.clamp_max(self.q.shape[1] - 1)  # padding repeats something
        batch = torch.arange(len(start)).unsqueeze(1)
        output, self.cache = ops.latent_attention(
            *(part[batch, rows] for part in (self.q, self.kv, self.cos, self.sin)),
            self.w_uk,
            self.w_uv,
            self.block_table,
            past,
            end - past,
            self.cache,
            self.cache_format,
            SCALE,
            1e-6,
            mode,
        )
        assert output.isfinite().all()
        return [one[: b - a] for one, a, b in zip(output, start, stop, strict=True)]

    def whole(self, mode: str = "absorbed") -> list[torch.Tensor]:
        return self.run([0] * len(self.lengths), self.lengths, mode)


def naive(s: Sequences, b: int) -> torch.Tensor:
    """Token by token, head by head, in float64, straight from the definition."""
    n = s.lengths[b]
    turn = torch.complex(s.cos[b], s.sin[b]).to(torch.complex128)[:n]  # [n, R / 2]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    c = s.kv[b, :n, :RANK].double()
    c = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    k_pe = rotated(s.kv[b, :n, RANK:])
    out = torch.zeros(n, HEADS, VALUE, dtype=torch.float64)
    q = s.q[b, :n].unflatten(-1, (HEADS, NOPE + ROPE))
    for h in range(HEADS):
        key = torch.cat([c @ s.w_uk[h].double().T, k_pe], dim=-1)
        value = c @ s.w_uv[h].double()
        query = torch.cat([q[:, h, :NOPE].double(), rotated(q[:, h, NOPE:])], dim=-1)
        for t in range(n):
            p = (key[: t + 1] @ query[t] * SCALE).softmax(0)
            out[t, h] = p @ value[: t + 1]
    return out.flatten(1)


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
def test_equals_the_definition(mode: str) -> None:
    s = Sequences([1, 63, 64, 65, 130])
    for b, found in enumerate(s.whole(mode)):
        assert worst(found, naive(s, b)) < 1e-5


def test_attention_is_sharp_enough_to_see_order() -> None:
    """The oracle itself would notice a neighbour taken for another."""
    s = Sequences([40])
    before = naive(s, 0)
    s.kv[0, [10, 11]] = s.kv[0, [11, 10]]
    assert worst(naive(s, 0), before) > 1e-2


@pytest.mark.parametrize("cache_format", ["fp32", "fp16", "int8", "int4"])
def test_chunks_do_not_matter(cache_format: str) -> None:
    torch.manual_seed(1)
    s = Sequences([150, 70], cache_format)
    whole = s.whole()
    torch.manual_seed(1)
    s = Sequences([150, 70], cache_format)
    first = s.run([0, 0], [63, 1])
    second = s.run([63, 1], [64, 60])
    third = s.run([64, 60], [150, 70])
    for pieces, expected in zip(zip(first, second, third, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cache_format", "bound"), [("fp16", 2e-3), ("int8", 3e-2), ("int4", 0.3)])
def test_quantised_formats_stay_near(cache_format: str, bound: float) -> None:
    s = Sequences([100], cache_format)
    found, expected = s.whole()[0].double(), naive(s, 0)
    assert (found - expected).norm() / expected.norm() < bound


def test_padding_touches_only_the_scratch_page() -> None:
    s = Sequences([100, 3])
    s.whole()
    last_page = s.block_table[1, 0]
    for part in s.cache:
        assert (part[last_page][3:] == 0).all()
        assert (part[s.block_table[1, 1]] == 0).all()
        assert (part[0] != 0).any()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="attention mode"):
        Sequences([2]).whole("sideways")


def test_the_op_passes_torchs_own_checks() -> None:
    s = Sequences([5, 3])
    arguments: tuple[Any, ...] = (
        *(s.q, s.kv, s.cos, s.sin, s.w_uk, s.w_uv, s.block_table),
        *(torch.zeros(2, dtype=torch.int64), torch.tensor(s.lengths), s.cache),
        *("fp32", SCALE, 1e-6, "auto"),
    )
    torch.library.opcheck(torch.ops.mla_deploy.latent_attention.default, arguments)
