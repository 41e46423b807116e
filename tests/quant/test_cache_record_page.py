"""docs/cache-record.md says what the records are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mla_deploy.cache import CachePart, Layout, cache_record
from mla_deploy.quant.cache_codes import group_size, unpack_codes

PAGE = (Path(__file__).parents[2] / "docs" / "cache-record.md").read_text(encoding="utf-8")
SIZES = [(512, 64), (128, 32), (256, 16), (96, 24)]


@pytest.mark.parametrize(
    "name", ["int2", "int3", "int4", "int4-g32", "fp8", "int8", "fp16", "fp32"]
)
def test_the_bytes(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| (\d+) \|", PAGE, re.MULTILINE)
    assert row is not None
    assert cache_record(name).bytes_per_token(512, 64) == int(row[1])


@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_the_formulas(rank: int, rope: int) -> None:
    g, h = group_size(rank, 64), group_size(rope, 16)
    rope_bytes = rope + 2 * rope // h
    int4 = rank // 2 + 4 * rank // g + rope_bytes
    assert cache_record("int4").bytes_per_token(rank, rope) == int4
    assert cache_record("int8").bytes_per_token(rank, rope) == rank + 2 * rank // g + rope_bytes
    assert cache_record("fp8").bytes_per_token(rank, rope) == rank + rope_bytes
    assert cache_record("int2").bytes_per_token(rank, rope) == int4 - rank // 4
    assert cache_record("int3").bytes_per_token(rank, rope) == int4 - rank // 8
    half = cache_record("int4-g32").bytes_per_token(rank, rope)
    assert half == rank // 2 + 4 * rank // group_size(rank, 32) + rope_bytes


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "fp8", "int8"])
def test_the_arrays(name: str) -> None:
    arrays = PAGE.split("## Arrays")[1]
    section = arrays.split(f"| `{name}` | ")[1].split("\n| `")[0]
    rows = re.findall(r"`(\w+)` \| (\w+) \| [^|]+ \| (\w+) \|", section)
    found = [
        (part.name, str(part.dtype).removeprefix("torch."), part.layout.value)
        for part in cache_record(name).parts(512, 64)
    ]
    assert rows == found


@pytest.mark.parametrize("layout", list(Layout))
def test_the_places_in_a_page(layout: Layout) -> None:
    width, page, slot = 24, 1, 37
    part = CachePart("x", torch.int16, layout, width)
    values = torch.arange(1, width + 1, dtype=torch.int16).unsqueeze(0)
    arena = part.write(part.empty(2), torch.tensor([page]), torch.tensor([slot]), values)
    flat = arena[page].flatten()
    for v in range(width):
        place = {
            Layout.BLOCKED: ((slot // 16 * (width // 4) + v // 4) * 16 + slot % 16) * 4 + v % 4,
            Layout.COLUMNS: 64 * v + slot,
            Layout.ROWS: width * slot + v,
        }[layout]
        assert int(flat[place]) == v + 1


def test_the_nibbles() -> None:
    packed = torch.randint(0, 256, (1, 1, 16), dtype=torch.uint8)
    channels = unpack_codes(packed, 4)[0, 0]
    for k in range(4):
        for j in range(4):
            byte = int(packed[0, 0, 4 * k + j])
            assert int(channels[8 * k + j]) == byte & 15
            assert int(channels[8 * k + 4 + j]) == byte >> 4
