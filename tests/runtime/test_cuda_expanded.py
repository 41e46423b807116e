"""The expanded mode of the CUDA kernels: chunks, rounds, and when it is chosen.

What holds for both modes is in test_cuda_attention.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.attention_case import AttentionCase, Dims, Error
from support.cuda import (
    Machine,
    build_emulation,
    check,
    emulation_wavefronts,
    gpu_machine,
    run_case,
)

from mla_deploy.ops import attention
from mla_deploy.runtime.cuda import AttentionSizes, CudaError, CudaKernels

pytestmark = pytest.mark.usefixtures("one_torch_thread")
FORMATS = ["int4", "int8", "fp16"]
HALF_MAX = 65504.0
SMALL = Dims(heads=4, nope=32, rank=256, rope=32, v=32)


@pytest.mark.parametrize(
    "dims",
    [
        Dims(heads=1, nope=8, rank=256, rope=16, v=8),
        Dims(heads=3, nope=64, rank=256, rope=48, v=72),
        Dims(heads=2),  # DeepSeek, Kimi
        Dims(heads=2, nope=192, v=256),  # GLM-4.7-Flash
        Dims(heads=2, nope=64, rank=256, rope=32, v=64),  # MiniCPM3
    ],
    ids=str,
)
def test_shapes(machine: Machine, dims: Dims) -> None:
    """A chunk is 128 tokens in the emulation: the sequence ends in the second one."""
    check(machine, AttentionCase([90], [70], dims=dims), "expanded")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_sequences_at_the_edges_of_tiles_and_chunks(machine: Machine, cache_format: str) -> None:
    dims = Dims(heads=1, nope=32, rank=256, rope=32, v=32)
    case = AttentionCase([62, 63, 0, 127, 128, 255], [2, 1, 64, 1, 129, 2], dims=dims,
                         cache_format=cache_format)  # fmt: skip
    check(machine, case, "expanded")


def test_long_calls_run_in_rounds(machine: Machine) -> None:
    """A round is one block of 128 tokens, as is a chunk: in the emulation always, on a GPU where
    all heads of four sequences are so many."""
    if machine.device.type == "cpu":
        check(machine, AttentionCase([5, 70], [200, 3], dims=SMALL), "expanded")
    else:
        case = AttentionCase([300, 5, 170, 0], [200, 3, 129, 64], dims=Dims(heads=128))
        check(machine, case, "expanded")


def test_only_what_a_round_sees_is_made() -> None:
    """Two rounds of 128 tokens, each over two chunks of 128. Those of the first round see one
    chunk, and in the second only the first sequence has any."""
    machine = Machine(build_emulation(), "cpu")
    emulation_wavefronts(forget=True)
    run_case(machine, AttentionCase([0, 70], [200, 3], dims=SMALL), mode="expanded")
    _, *launches = emulation_wavefronts()  # Append, then Unpack, Expand, Expanded of each chunk
    made = [taken for taken, _ in launches[1::3]]
    print(made)
    of_one = made[-1]
    assert of_one > 0
    assert made == [2 * of_one, 0, of_one, of_one]


@pytest.mark.parametrize("cache_format", ["int4", "int8"])
def test_latents_beyond_half_precision_saturate(machine: Machine, cache_format: str) -> None:
    """A scale and a code hold what no half does, where no norm keeps latents small."""
    case = AttentionCase([0], [70], dims=SMALL, cache_format=cache_format, norm=False)
    large = slice(64, 128)  # a group, of which keys see nothing, and values little
    case.all_kv[..., large] *= HALF_MAX
    case.w_uk[..., large] = 0
    case.w_uv[:, large] /= 16
    output, cache = run_case(machine, case, mode="expanded")
    c_kv, k_pe = attention.read(
        case.block_table, cache, case.record, SMALL.rank, SMALL.rope, torch.float64
    )
    assert c_kv.abs().max() > 2 * HALF_MAX
    q, _, cos, sin = (x.double() for x in case.new_inputs())
    expected = attention.attend_absorbed(
        *attention.new_queries(q, cos, sin, SMALL.heads, SMALL.nope),
        c_kv.clamp(-HALF_MAX, HALF_MAX),
        k_pe,
        *(case.w_uk.double(), case.w_uv.double(), case.past, case.scale),
    )
    error = Error.of(case.real(output), case.real(expected))
    print(error)
    assert error.relative < 3e-3


@pytest.mark.parametrize(("steps", "mode"), [(67, "absorbed"), (68, "expanded")])
def test_the_mode_with_fewer_operations_is_chosen(machine: Machine, steps: int, mode: str) -> None:
    """A block of 128 rows, 160 products a pair, and 256 (32 + 32) for a key and its value; absorbed
    544 a pair, of real rows alone."""
    case = AttentionCase([20], [steps], dims=SMALL)
    chosen, _ = run_case(machine, case)
    for name in ("absorbed", "expanded"):
        output, _ = run_case(machine, case, mode=name)
        assert torch.equal(output, chosen) == (name == mode)


def chosen_mode(sizes: AttentionSizes) -> str:
    """What auto is for a call of these sizes, by the workspace that each needs."""
    kernels = CudaKernels(build_emulation())
    needed = {
        mode: kernels.workspace_bytes(dataclasses.replace(sizes, mode=mode))
        for mode in ("auto", "absorbed", "expanded")
    }
    assert needed["absorbed"] != needed["expanded"]
    return "absorbed" if needed["auto"] == needed["absorbed"] else "expanded"


@pytest.mark.parametrize(
    ("dims", "changes"),
    [
        (Dims(heads=1), {1: "absorbed", 196: "expanded"}),  # DeepSeek, Kimi
        (
            Dims(heads=1, nope=192, v=256),  # GLM-4.7-Flash
            {1: "absorbed", 422: "expanded", 449: "absorbed", 452: "expanded"},
        ),
        (
            Dims(heads=1, nope=64, rank=256, rope=32, v=64),  # MiniCPM3
            {1: "absorbed", 98: "expanded", 129: "absorbed", 136: "expanded"},
        ),
        # of test_cuda_end_to_end.py, whose prompts of 70 and 60 tokens are to take both
        (Dims(heads=4, nope=24, rank=256, rope=16, v=24), {1: "absorbed", 63: "expanded"}),
    ],
    ids=str,
)
def test_lengths_that_pay_are_those_of_the_table(dims: Dims, changes: dict[int, str]) -> None:
    """The table in docs/cuda.md. Changes: the mode from so many new tokens on."""
    expected = ""
    for steps in range(1, 600):
        expected = changes.get(steps, expected)
        sizes = AttentionSizes(
            batch=1, steps=steps, table_pages=2, heads=dims.heads, nope=dims.nope, rank=dims.rank,
            rope=dims.rope, v=dims.v, cache_format="int4",
        )  # fmt: skip
        assert chosen_mode(sizes) == expected, steps


def test_chunks_too_small_to_pay_are_not_chosen() -> None:
    """128 heads leave the emulation no more than the least chunk, a quarter of what pays."""
    sizes = AttentionSizes(
        batch=1, steps=500, table_pages=9, heads=128, nope=32, rank=256, rope=32, v=32,
        cache_format="int4",
    )  # fmt: skip
    assert chosen_mode(sizes) == "absorbed"
    in_one_chunk = dataclasses.replace(sizes, table_pages=2)
    assert chosen_mode(in_one_chunk) == "expanded"


@pytest.mark.parametrize("changes", [{"nope": 248}, {"v": 264}])
def test_heads_too_wide_are_refused_or_absorbed(changes: dict[str, int]) -> None:
    kernels = CudaKernels(build_emulation())
    sizes = AttentionSizes(
        batch=1, steps=3000, table_pages=50, heads=1, nope=32, rank=512, rope=16, v=32,
        cache_format="int4",
    )  # fmt: skip
    sizes = dataclasses.replace(sizes, **changes)
    absorbed = kernels.workspace_bytes(dataclasses.replace(sizes, mode="absorbed"))
    assert kernels.workspace_bytes(sizes) == absorbed
    with pytest.raises(CudaError, match="allowed: up to 256 each; let mode be auto"):
        kernels.workspace_bytes(dataclasses.replace(sizes, mode="expanded"))


@pytest.mark.parametrize(
    "dims",
    [
        Dims(heads=1),
        Dims(heads=1, nope=64, rank=256, rope=32, v=64),
        Dims(heads=1, nope=192, v=256),
    ],
    ids=str,
)
def test_shared_memory_is_read_without_bank_conflicts(dims: Dims) -> None:
    machine = Machine(build_emulation(), "cpu")
    case = AttentionCase([0], [128], dims=dims)
    emulation_wavefronts(forget=True)
    run_case(machine, case, mode="expanded")
    _, _, expand, attend = emulation_wavefronts()
    print(expand, attend)
    assert expand[0] == expand[1] > 0
    assert attend[0] == attend[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", FORMATS)
def test_long_prompts_on_a_gpu(cache_format: str) -> None:
    """Two chunks, the first of 3,584 tokens of each sequence; several blocks of rows."""
    machine = gpu_machine()
    case = AttentionCase([4500, 130], [140, 200], dims=Dims(heads=16), cache_format=cache_format)
    output = check(machine, case, "expanded")
    absorbed, _ = run_case(machine, case, mode="absorbed")
    assert Error.of(case.real(output), case.real(absorbed).double()).relative < 3e-3
