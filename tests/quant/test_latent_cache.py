"""The cache records: sizes, exactness where there is any, and hard inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_deploy.cache import Layout, cache_formats, cache_record
from mla_deploy.errors import ConfigError
from mla_deploy.manifest import PAGE_TOKENS
from mla_deploy.quant.cache_codes import (
    decode_fp8,
    encode_fp8,
    encode_symmetric_int8,
    group_size,
    pack_codes,
    solve_affine,
    unpack_codes,
)

BYTES_AT_512_64 = {
    "int2": 232, "int3": 296, "int4": 360, "int4-g32": 392, "fp8": 584, "int8": 600, "fp16": 1152,
    "fp32": 2304,
}  # fmt: skip
FORMATS = list(BYTES_AT_512_64)
LEVELS = 15
STEPS = {"int2": 3, "int3": 7, "int4": 15, "int4-g32": 15, "int8": 127}


def round_trip(name: str, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
    record = cache_record(name)
    values = [value.unsqueeze(0) for value in record.encode(c_kv, k_pe)]
    return [one[0] for one in record.decode(values, torch.float32)]


def test_the_formats_are_registered() -> None:
    assert set(FORMATS) <= set(cache_formats())


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_per_token(name: str) -> None:
    assert cache_record(name).bytes_per_token(512, 64) == BYTES_AT_512_64[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 32), (128, 32), (96, 24), (64, 16)])
def test_parts_hold_what_encode_gives(name: str, rank: int, rope: int) -> None:
    record = cache_record(name)
    encoded = record.encode(torch.randn(3, rank), torch.randn(3, rope))
    for part, values in zip(record.parts(rank, rope), encoded, strict=True):
        assert values.shape == (3, part.width)
        assert values.dtype is part.dtype
        page = part.empty(1)
        assert page.nbytes == part.bytes_per_token * PAGE_TOKENS


@pytest.mark.parametrize("name", FORMATS)
def test_a_page_gives_back_what_was_written(name: str) -> None:
    record = cache_record(name)
    encoded = record.encode(torch.randn(100, 128), torch.randn(100, 32))
    table = torch.tensor([[3, 1]])
    position = torch.arange(100)
    page, slot = table[0, position // PAGE_TOKENS], position % PAGE_TOKENS
    for part, values in zip(record.parts(128, 32), encoded, strict=True):
        arena = part.write(part.empty(4), page, slot, values)
        assert torch.equal(part.read(arena, table)[0, :100], values)
        assert not arena[0].any()
        assert not arena[2].any()


def test_blocked_lines_are_as_documented() -> None:
    """Byte (b, k, t, j) of a page: token 16 b + t, channels 8 k + j and 8 k + 4 + j."""
    record = cache_record("int4")
    c_kv = torch.randn(64, 128)
    codes, *_ = solve_affine(c_kv.reshape(64, 2, 64), LEVELS)
    codes = codes.reshape(64, 128).to(torch.uint8)
    part = record.parts(128, 32)[0]
    assert part.layout is Layout.BLOCKED
    values = record.encode(c_kv, torch.randn(64, 32))[0]
    page = part.write(part.empty(1), torch.zeros(64, dtype=torch.int64), torch.arange(64), values)
    for b, k, t, j in [(0, 0, 0, 0), (1, 3, 5, 2), (3, 15, 15, 3)]:
        low, high = codes[16 * b + t, 8 * k + j], codes[16 * b + t, 8 * k + 4 + j]
        assert page[0, b, k, t, j] == low + 16 * high


def test_int4_beats_rounding_to_the_range() -> None:
    """The least-squares scale and zero are worth something."""
    x = torch.randn(2000, 64)
    codes, scale, zero = solve_affine(x, LEVELS)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / LEVELS
    plain = ((x - low) / step).round() * step + low
    ours = (codes * scale.float() + zero.float() - x).square().mean()
    assert ours < 0.92 * (plain - x).square().mean()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(64),
        torch.full((64,), 3.25),
        torch.full((64,), -7.0),
        torch.eye(64)[5] * 20,
        torch.full((64,), 1e-40),
        torch.linspace(-1e-38, 1e-38, 64),
        torch.linspace(-6e4, 6e4, 64),
        torch.linspace(100.0, 101.0, 64),
    ],
    ids=["zero", "constant", "negative", "one-hot", "denormal", "tiny", "huge", "far from zero"],
)
def test_hard_groups_stay_finite_and_near(name: str, row: torch.Tensor) -> None:
    c_kv, k_pe = round_trip(name, row.unsqueeze(0), row[None, :16])
    step = (row.amax() - row.amin()) / STEPS[name]
    slack = 0.51 * step + 2e-3 * row.abs().amax() + 1e-7
    assert (c_kv[0] - row).abs().max() <= slack + (row.abs().amax() / 127 if name == "int8" else 0)
    assert k_pe.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(1e-3, 100),
    shift=st.floats(-50, 50),
    heavy=st.booleans(),
)
def test_int4_error_is_bounded_by_its_step(
    seed: int, spread: float, shift: float, heavy: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 64, generator=generator)
    x = (x**3 if heavy else x) * spread + shift
    codes, scale, zero = solve_affine(x, LEVELS)
    assert codes.amin() >= 0
    assert codes.amax() <= LEVELS
    inside = (codes > 0) & (codes < LEVELS)
    error = (codes * scale.float() + zero.float() - x).abs()
    rounding = 1e-3 * x.abs().amax()  # of the zero in float16
    assert (error[inside] <= (0.5 * scale.float() + rounding).expand_as(x)[inside]).all()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), group=st.sampled_from([4, 8, 16]))
def test_int8_error_is_half_a_step(seed: int, group: int) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    codes, scale = encode_symmetric_int8(x, group)
    wide = scale.float().repeat_interleave(group, dim=1)
    assert ((codes * wide - x).abs() <= 0.51 * wide + 1e-3 * x.abs()).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_come_back_and_lie_as_documented(bits: int) -> None:
    codes = torch.randint(2**bits, (7, 64))
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed.unsqueeze(0), bits)[0], codes.to(torch.uint8))
    count = 8 // bits
    for k, i, j in [(0, 0, 0), (1, count - 1, 3), (0, 1, 2)]:
        found = (packed[5, 4 * k + j] >> (bits * i)) & (2**bits - 1)
        assert found == codes[5, 4 * count * k + 4 * i + j]


def test_fp8_is_the_one_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every & 127) < 127]  # 127 and 255 stand for NaN
    expected = finite.view(torch.float8_e4m3fn).float()
    assert torch.equal(decode_fp8(finite, torch.float32), expected)
    assert torch.equal(encode_fp8(expected)[expected != 0], finite[expected != 0])
    halfway = (expected[1:126] + expected[2:127]) / 2
    x = torch.cat((torch.randn(20000) * 2.0 ** torch.randint(-12, 9, (20000,)), halfway, -halfway))
    rounded = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(decode_fp8(encode_fp8(x), torch.float32), rounded)


def test_group_size() -> None:
    assert [group_size(width, 64) for width in (512, 96, 48, 20)] == [64, 32, 16, 4]


def test_a_latent_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot hold this latent"):
        cache_record("int4").parts(100, 64)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown cache format"):
        cache_record("int5")
