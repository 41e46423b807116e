"""The native latent attention against naive oracles in float64, on every instruction set here.

Two oracles tell two errors apart: one reads the original latents (its distance is mostly the
cache's quantisation), one the cache's own content, decoded (its distance is the kernel's alone).
Queries are scaled so that attention is far from uniform, or the test would be blind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mla_deploy.cache import PAGE_TOKENS, CacheRecord, cache_record
from mla_deploy.ops import attention
from mla_deploy.runtime import _runtime

ISAS = _runtime.cpu_isas()
EXPONENT = 2.5  # standard deviation of the scores
EPSILON = 1e-6


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The oracles are many small products, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


class Case:
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

    def run(
        self,
        isa: str,
        *,
        mode: str = "auto",
        precision: str = "bf16",
        threads: int = 2,
        executor: _runtime.LatentAttentionExecutor | None = None,
        weights: _runtime.LatentAttentionWeights | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The kernel's output on a poisoned array, and its cache; this case's cache is kept."""
        d = self.dims
        weights = weights or _runtime.LatentAttentionWeights(
            self.w_uk.numpy(), self.w_uv.numpy(), d.rope, precision
        )
        cache = [part.clone() for part in self.cache]
        output = torch.full((self.batch, self.steps, d.heads * d.v), torch.nan)
        _runtime.latent_attention(
            executor or _runtime.LatentAttentionExecutor(threads),
            *(x.numpy() for x in self.new_inputs()),
            weights,
            self.block_table.numpy(),
            self.past.numpy(),
            self.new.numpy(),
            [part.numpy() for part in cache],
            output.numpy(),
            self.cache_format,
            self.scale,
            self.epsilon,
            mode,
            isa,
        )
        assert output.isfinite().all(), "an output was not written"
        return output, cache

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


# The kernel's own error, relative: exact kernels; bf16 with queries and probabilities in 8 bit
# (int4 cache) or 14 bit (int8 cache); weights in int8 on top.
KERNEL = {"fp32": 3e-5, "bf16": 2.5e-2, "int8": 3.5e-2}


def check(case: Case, isa: str, mode: str = "auto", precision: str = "bf16") -> None:
    output, cache = case.run(isa, mode=mode, precision=precision)
    found = case.real(output)
    kernel = Error.of(found, case.oracle(cache))
    total = Error.of(found, case.oracle(None))
    cache_alone = Error.of(case.oracle(cache), case.oracle(None))
    print(f"{isa} {case.cache_format} {mode} {precision} {case.dims}")
    print(f"  kernel error       {kernel}")
    print(f"  quantisation error {cache_alone}")
    print(f"  both               {total}")
    exact = precision == "fp32" or isa == "portable"
    assert kernel.relative < (
        KERNEL["fp32"] if exact and precision != "int8" else KERNEL[precision]
    )
    assert kernel.cosine > 0.99
    if case.cache_format == "int4" and precision != "int8":
        assert kernel.relative < cache_alone.relative / 5
        assert total.relative < cache_alone.relative * 1.1


EDGES = ([0, 62, 63, 64, 65, 127, 191, 300], [1, 1, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_format", ["int4", "int8", "fp16", "fp32"])
def test_decoding_at_page_edges(isa: str, cache_format: str) -> None:
    check(Case(*EDGES, cache_format=cache_format), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_format", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
def test_prompts_of_unequal_length(isa: str, cache_format: str, mode: str) -> None:
    dims = Dims(heads=3, nope=48, rank=128, rope=32, v=40)
    check(Case([0, 70, 5, 600], [65, 33, 7, 1], dims=dims, cache_format=cache_format), isa, mode)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_format", ["int4", "int8", "fp16", "fp32"])
@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
def test_fp32_weights_make_the_kernel_exact(isa: str, cache_format: str, mode: str) -> None:
    dims = Dims(heads=5, nope=32, rank=192, rope=16, v=32)
    check(Case([130, 0], [3, 20], dims=dims, cache_format=cache_format), isa, mode, "fp32")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
def test_int8_weights(isa: str, mode: str) -> None:
    check(Case([200], [20], dims=Dims(heads=4, rank=256)), isa, mode, "int8")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "dims",
    [
        Dims(heads=1, nope=16, rank=16, rope=16, v=16),
        Dims(heads=2, nope=20, rank=48, rope=20, v=12),
        Dims(heads=17, nope=64, rank=96, rope=128, v=64),
        Dims(heads=20, nope=64, rank=256, rope=32, v=64),
        Dims(heads=40, nope=64, rank=256, rope=32, v=64),
        Dims(heads=128, nope=32, rank=320, rope=64, v=32),
        Dims(heads=4, nope=128, rank=1024, rope=64, v=128),
    ],
    ids=str,
)
@pytest.mark.parametrize("cache_format", ["int4", "int8"])
def test_shapes(isa: str, dims: Dims, cache_format: str) -> None:
    check(Case([77, 130], [2, 1], dims=dims, cache_format=cache_format), isa, "absorbed")


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "portable"])
def test_a_long_sequence_is_split_over_threads(isa: str) -> None:
    case = Case([5000], [1], dims=Dims(heads=16, nope=32, rank=128, rope=32, v=32))
    check(case, isa)
    alone, _ = case.run(isa, threads=1)
    split, _ = case.run(isa, threads=8)
    assert Error.of(split, alone.double()).relative < 5e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_format", ["int4", "int8", "fp16"])
def test_appended_bytes(isa: str, cache_format: str) -> None:
    """As the reference writes them: at most 1 code in 10,000 differs, by one step."""
    case = Case([3, 64, 0], [150, 120, 70], cache_format=cache_format, dims=Dims(heads=1))
    q, kv, cos, sin = case.new_inputs()
    _, expected = torch.ops.mla_deploy.latent_attention(
        q, kv, cos, sin, case.w_uk, case.w_uv, case.block_table, case.past, case.new,
        [part.clone() for part in case.cache], cache_format, case.scale, case.epsilon, "absorbed",
    )  # fmt: skip
    _, found = case.run(isa)
    _, by_oracle = case.run("portable")
    names = [part.name for part in case.record.parts(case.dims.rank, case.dims.rope)]
    for name, one, other, portable in zip(names, expected, found, by_oracle, strict=True):
        one, other = one[1:], other[1:]  # page 0 is nobody's
        assert torch.equal(other, portable[1:]), f"{isa} and portable write other bytes: {name}"
        if name == "codes" and cache_format == "int4":
            one, other = attention_nibbles(one), attention_nibbles(other)
        if one.dtype.is_floating_point:
            # A code on a rounding edge of an early round moves a group's scale and zero a little.
            assert torch.allclose(one.float(), other.float(), rtol=5e-2, atol=5e-2), name
            near = torch.isclose(one.float(), other.float(), rtol=1e-3, atol=1e-6)
            assert (~near).float().mean() < 2e-3, name
            assert (one != other).float().mean() < 1e-2, name
            continue
        gap = (one.int() - other.int()).abs()
        print(f"{name}: {int((gap > 0).sum())} of {gap.numel()} codes differ")
        assert int(gap.max()) <= 1
        assert float((gap > 0).float().mean()) <= 1e-4


def attention_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4])


@pytest.mark.parametrize("isa", ISAS)
def test_constant_and_zero_latents(isa: str) -> None:
    case = Case([0], [4], norm=False, dims=Dims(heads=2, rank=64))
    case.all_kv[:, 0] = 0
    case.all_kv[:, 1] = 3
    case.all_kv[:, 2] = -1e-8
    check(case, isa, "absorbed", "fp32")
    case.run(isa)  # finite, which run() checks


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_format", ["int4", "fp16"])
def test_a_prompt_in_chunks_equals_the_whole(isa: str, cache_format: str) -> None:
    dims = Dims(heads=4, nope=32, rank=128, rope=32, v=32)
    whole = Case([0], [200], dims=dims, cache_format=cache_format)
    weights = _runtime.LatentAttentionWeights(
        whole.w_uk.numpy(), whole.w_uv.numpy(), dims.rope, "fp32"
    )
    executor = _runtime.LatentAttentionExecutor(2)
    expected, expected_cache = whole.run(isa, weights=weights, executor=executor)
    pieces, cache = [], whole.cache
    for start, stop in [(0, 1), (1, 64), (64, 65), (65, 190), (190, 200)]:
        piece = Case([start], [stop - start], dims=dims, cache_format=cache_format)
        piece.all_kv, piece.all_cos, piece.all_sin = whole.all_kv, whole.all_cos, whole.all_sin
        piece.q, piece.block_table, piece.cache = whole.q[:, start:stop], whole.block_table, cache
        output, cache = piece.run(isa, weights=weights, executor=executor)
        pieces.append(output)
    for one, other in zip(expected_cache, cache, strict=True):
        assert torch.equal(one, other)
    assert Error.of(torch.cat(pieces, 1), expected.double()).relative < 2e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
def test_the_rest_of_the_arena_is_neither_written_nor_heeded(isa: str, mode: str) -> None:
    case = Case([70, 1], [3, 2], dims=Dims(heads=4, nope=32, rank=128, rope=32, v=32))
    clean_output, clean = case.run(isa, mode=mode)
    used = case.block_table[0, :2].tolist() + case.block_table[1, :1].tolist()
    for part in case.cache:
        for page in range(part.shape[0]):
            if page not in used:
                part[page] = 99  # of other sequences, or left by them
    part_widths = case.record.parts(case.dims.rank, case.dims.rope)
    stale = [part.clone() for part in case.cache]
    for part, arena in zip(part_widths, case.cache, strict=True):  # slots that a rewind left
        left = torch.full((1, part.width), 77, dtype=arena.dtype)
        arena.copy_(part.write(arena, case.block_table[1, :1], torch.tensor([40]), left))
    output, cache = case.run(isa, mode=mode)
    assert torch.equal(case.real(output), case.real(clean_output))
    for arena, before, start in zip(cache, stale, clean, strict=True):
        for page in range(arena.shape[0]):
            if page not in used:
                assert torch.equal(arena[page], before[page])
        assert torch.equal(arena[used[0]], start[used[0]])


def test_the_torch_op_agrees() -> None:
    case = Case([0, 64], [40, 3], dims=Dims(heads=4, nope=32, rank=128, rope=32, v=32))
    q, kv, cos, sin = case.new_inputs()
    expected, _ = torch.ops.mla_deploy.latent_attention(
        q, kv, cos, sin, case.w_uk, case.w_uv, case.block_table, case.past, case.new,
        [part.clone() for part in case.cache], "int4", case.scale, case.epsilon, "expanded",
    )  # fmt: skip
    for isa in ISAS:
        output, _ = case.run(isa, precision="fp32")
        error = Error.of(case.real(output), case.real(expected).double())
        print(isa, error)
        assert error.relative < 1e-4


def test_auto_chooses_by_length() -> None:
    short = dataclasses.replace(Dims(), heads=2)
    for past, new in ([200], [1]), ([0], [300]):
        case = Case(past, new, dims=short)
        output, _ = case.run("auto", mode="auto")
        same, _ = case.run("auto", mode="absorbed" if new == [1] else "expanded")
        assert torch.equal(output, same)
