"""The CUDA kernels against naive oracles in float64: emulated on the host, and on a GPU.

The emulation runs the kernels' own source (`support/cuda.py`): a wrong index, mask, fragment or
barrier shows here without a GPU. Both machines get the same cases and the same bounds.
"""

from __future__ import annotations

import pytest
import torch
from support.attention_case import AttentionCase, Dims, Error
from support.cuda import (
    Machine,
    build_emulation,
    cache_pages,
    check,
    emulation_wavefronts,
    gpu_machine,
    run_case,
)

from mla_deploy.runtime import _runtime

pytestmark = pytest.mark.usefixtures("one_torch_thread")
FORMATS = ["int4", "int8", "fp16"]
MODES = ["absorbed", "expanded"]
SMALL = Dims(heads=4, nope=32, rank=256, rope=32, v=32)


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("rank", [256, 512])
def test_decoding_at_page_edges(machine: Machine, cache_format: str, rank: int) -> None:
    dims = Dims(heads=16, nope=32, rank=rank, v=32)
    check(machine, AttentionCase([0, 31, 63, 64, 65, 127, 191], [1] * 7, dims=dims,
                                 cache_format=cache_format))  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_prompts_of_unequal_length(machine: Machine, cache_format: str, mode: str) -> None:
    dims = Dims(heads=3, nope=48, rank=256, rope=32, v=40)
    check(machine, AttentionCase([0, 70, 5, 200], [33, 20, 0, 1], dims=dims,
                                 cache_format=cache_format), mode)  # fmt: skip


@pytest.mark.parametrize(
    "dims",
    [
        Dims(heads=1, nope=8, rank=256, rope=16, v=8),
        Dims(heads=8, nope=64, rank=256, rope=48, v=72),
        Dims(heads=16),  # DeepSeek-V2-Lite, Moonlight
        Dims(heads=20, nope=192, v=256),  # GLM-4.7-Flash
        Dims(heads=40, nope=64, rank=256, rope=32, v=64),  # MiniCPM3
        Dims(heads=64, nope=8, v=8),  # Kimi-K2
        Dims(heads=128, nope=8, v=8),  # DeepSeek-V3
    ],
    ids=str,
)
def test_shapes(machine: Machine, dims: Dims) -> None:
    check(machine, AttentionCase([77, 0], [1, 1], dims=dims))


@pytest.mark.parametrize("cache_format", FORMATS)
def test_splits_are_merged(machine: Machine, cache_format: str) -> None:
    """More runs than tiles, too: some have no token at all."""
    case = AttentionCase([333, 3], [1, 1], dims=SMALL, cache_format=cache_format)
    whole = check(machine, case, splits=1)
    for splits in (2, 5, 16):
        cut = check(machine, case, splits=splits)
        assert Error.of(case.real(cut), case.real(whole).double()).relative < 3e-3


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("dims", [Dims(heads=1), Dims(heads=1, rank=256, rope=48)], ids=str)
def test_appended_bytes_are_those_of_the_cpu(
    machine: Machine, cache_format: str, dims: Dims
) -> None:
    case = AttentionCase([3, 64, 0], [150, 120, 70], cache_format=cache_format, dims=dims)
    weights = _runtime.LatentAttentionWeights(
        case.w_uk.numpy(), case.w_uv.numpy(), dims.rope, "fp32"
    )
    expected = [part.clone() for part in case.cache]
    _runtime.latent_attention(
        _runtime.LatentAttentionExecutor(1),
        *(x.numpy() for x in case.new_inputs()),
        weights,
        *(x.numpy() for x in (case.block_table, case.past, case.new)),
        [part.numpy() for part in expected],
        torch.empty(case.batch, case.steps, dims.heads * dims.v).numpy(),
        cache_format,
        case.scale,
        case.epsilon,
        isa="portable",
        append_only=True,
    )
    _, found = run_case(machine, case, append_only=True)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_constant_and_zero_latents(machine: Machine, mode: str) -> None:
    case = AttentionCase([0], [4], norm=False, dims=Dims(heads=2, rank=256))
    case.all_kv[:, 0] = 0
    case.all_kv[:, 1] = 3
    case.all_kv[:, 2] = -1e-8
    check(machine, case, mode)


@pytest.mark.parametrize("mode", MODES)
def test_scores_far_apart_stay_finite(machine: Machine, mode: str) -> None:
    """Queries beyond half's range saturate; which of two close tokens wins may then change."""
    case = AttentionCase([100], [2], dims=SMALL)
    case.scale *= 1e6
    run_case(machine, case, mode=mode)  # finite, which run_case() checks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache_format", ["int4", "fp16"])
def test_a_prompt_in_chunks_equals_the_whole(
    machine: Machine, cache_format: str, mode: str
) -> None:
    whole = AttentionCase([0], [100], dims=SMALL, cache_format=cache_format)
    expected, expected_cache = run_case(machine, whole, mode=mode)
    pieces, cache = [], whole.cache
    for start, stop in [(0, 1), (1, 64), (64, 65), (65, 90), (90, 100)]:
        piece = AttentionCase([start], [stop - start], dims=SMALL, cache_format=cache_format)
        piece.all_kv, piece.all_cos, piece.all_sin = whole.all_kv, whole.all_cos, whole.all_sin
        piece.w_uk, piece.w_uv = whole.w_uk, whole.w_uv
        piece.q, piece.block_table, piece.cache = whole.q[:, start:stop], whole.block_table, cache
        output, cache = run_case(machine, piece, mode=mode)
        pieces.append(output)
    for one, other in zip(expected_cache, cache, strict=True):
        assert torch.equal(one, other)
    assert Error.of(torch.cat(pieces, 1), expected.double()).relative < 3e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache_format", FORMATS)
def test_the_rest_of_the_arena_is_neither_written_nor_heeded(
    machine: Machine, cache_format: str, mode: str
) -> None:
    case = AttentionCase([70, 1], [3, 2], dims=SMALL, cache_format=cache_format)
    clean_output, clean = run_case(machine, case, mode=mode)
    used = cache_pages(case)
    lengths = (case.past + case.new).tolist()
    record_parts = case.record.parts(case.dims.rank, case.dims.rope)
    for part, arena in zip(record_parts, case.cache, strict=True):
        # NaN where the type has it: of other sequences, and slots that a rewind left
        foreign = torch.nan if arena.dtype.is_floating_point else 99
        for page in range(arena.shape[0]):
            if page not in used:
                arena[page] = foreign
        for b, length in enumerate(lengths):
            slots = torch.arange(length % 64, 64)
            page = case.block_table[b, length // 64].expand(len(slots))
            left = torch.full((len(slots), part.width), foreign, dtype=arena.dtype)
            arena.copy_(part.write(arena, page, slots, left))
    stale = [part.clone() for part in case.cache]
    output, cache = run_case(machine, case, mode=mode)
    assert torch.equal(output, clean_output)
    for part, arena, before, after in zip(record_parts, cache, stale, clean, strict=True):
        for page in range(arena.shape[0]):
            if page not in used:
                assert torch.equal(arena[page].nan_to_num(), before[page].nan_to_num()), (
                    "a page of somebody else's was written"
                )
        for b, length in enumerate(lengths):
            table = case.block_table[b : b + 1]
            assert torch.equal(
                part.read(arena, table)[:, :length], part.read(after, table)[:, :length]
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_activations_and_strides(
    machine: Machine, dtype: torch.dtype, mode: str
) -> None:
    case = AttentionCase([40, 64], [3, 2], dims=SMALL)
    exact = [x.to(dtype).float() for x in (case.q, case.all_kv)]
    case.q, case.all_kv = exact
    output, cache = run_case(machine, case, mode=mode, dtype=dtype, padding=8)
    error = Error.of(case.real(output), case.oracle(cache))
    print(error)
    assert error.relative < (3e-3 if dtype == torch.float16 else 8e-3)


def test_long_calls_run_in_rounds(machine: Machine) -> None:
    """A round is 96 rows in the emulation, 16384 on a GPU: the cases are longer."""
    if machine.device.type == "cpu":
        check(machine, AttentionCase([5, 70, 0], [40, 3, 17], dims=SMALL))
    else:
        check(machine, AttentionCase([5, 70, 0], [90, 3, 17], dims=Dims(heads=128, nope=8, v=8)))


@pytest.mark.parametrize("mode", MODES)
def test_lengths_that_do_not_fit_are_reported(machine: Machine, mode: str) -> None:
    case = AttentionCase([10, 20], [2, 2], dims=SMALL)
    before = [part.clone() for part in case.cache]
    case.past[1] = 64 * case.pages
    _, cache = run_case(machine, case, mode=mode, expect_problem=1)
    theirs = case.block_table[1]
    for one, other in zip(before, cache, strict=True):
        assert torch.equal(one[theirs], other[theirs])


@pytest.mark.parametrize("mode", MODES)
def test_pages_that_do_not_exist_are_reported(machine: Machine, mode: str) -> None:
    case = AttentionCase([10, 70], [2, 2], dims=SMALL)
    case.block_table[1, 1] = 10**12
    run_case(machine, case, mode=mode, expect_problem=2)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("heads", [16, 32, 128])
def test_long_sequences_on_a_gpu(cache_format: str, heads: int) -> None:
    dims = Dims(heads=heads, nope=32, v=32)
    check(gpu_machine(), AttentionCase([9000, 130], [1, 1], dims=dims, cache_format=cache_format))


@pytest.mark.parametrize(("cache_format", "most"), [("int4", 1.0), ("int8", 1.04), ("fp16", 1.06)])
@pytest.mark.parametrize(("rank", "heads"), [(512, 16), (256, 32)])
def test_shared_memory_is_read_without_bank_conflicts(
    cache_format: str, most: float, rank: int, heads: int
) -> None:
    machine = Machine(build_emulation(), "cpu")
    dims = Dims(heads=heads, nope=8, rank=rank, v=8)
    emulation_wavefronts(forget=True)
    case = AttentionCase([200], [1], dims=dims, cache_format=cache_format)
    run_case(machine, case, mode="absorbed")
    queries, attend, _, outputs = emulation_wavefronts()
    print(queries, attend, outputs)
    assert queries[0] == queries[1] > 0
    assert outputs[0] == outputs[1] > 0
    assert 0 < attend[0] <= most * attend[1]
