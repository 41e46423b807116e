"""What nvcc makes of the CUDA kernels, where there is one; no GPU needed."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.cuda import build_emulation

from mla_deploy.cache import cache_record
from mla_deploy.runtime import cuda
from mla_deploy.runtime.cuda import MODES, AttentionSizes, CudaError, CudaKernels

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "cuda_resources", ROOT / "tools" / "cuda_resources.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc 13")
@pytest.mark.parametrize("target", ["80", "90"])
def test_int4_attention_spills_no_registers(resources: ModuleType, target: str) -> None:
    """tools/cuda_resources.py does the same for all kernels and targets, in minutes."""
    found = resources.measure(NVCC, "attend_int4", target)
    for kernel in found:
        print(kernel)
    assert len(found) == 8
    assert not any(kernel.spill_bytes or kernel.stack_bytes for kernel in found)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc 13")
@pytest.mark.parametrize(("source", "target"), [("latent_attention", "120"), ("expanded", "86")])
def test_the_other_kernels_spill_none_either(
    resources: ModuleType, source: str, target: str
) -> None:
    found = resources.measure(NVCC, source, target)
    assert len(found) == {"latent_attention": 9, "expanded": 7}[source]
    assert not any(kernel.spill_bytes for kernel in found)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc 13")
@pytest.mark.parametrize(
    ("targets", "built_for"),
    [
        ([], "sm_80 sm_86 sm_87 sm_89 sm_90 sm_110 sm_120 compute_90 compute_120"),
        (["80", "90"], "sm_80 sm_90 compute_90"),
        (["87"], "sm_87 compute_87"),
    ],
    ids=str,
)
def test_ptx_is_kept_for_devices_between_and_after_the_targets(
    tmp_path: Path, targets: list[str], built_for: str
) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    command = ["cmake", "-S", ROOT / "runtime", "-B", tmp_path, "-DMLA_CUDA=ON", "-DMLA_OPS=OFF"]
    command += ["-DMLA_PYTHON=OFF", "-DMLA_ENGINE=OFF"]
    command += [f"-DMLA_CUDA_TARGETS={';'.join(targets)}"] if targets else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"libmla_deploy_cuda.so is built for {built_for}\n" in done.stdout


def test_a_report_of_ptxas_is_read(resources: ModuleType) -> None:
    report = (
        "ptxas info    : Compiling entry function '_ZN3mla4cuda5entryINS0_6AttendINS0_10Int4FormatE"
        "Li512ELi2ELi64EEEEEvNS0_6ParamsE' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN3mla4cuda5entryI\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 202 registers, used 1 barriers, 616 bytes cmem[0]\n"
    )
    (found,) = resources.read_report(report)
    assert found == resources.Resources("90", "Attend<Int4, 512, 2, 64>", 202, 16, 20)


def test_the_header_is_c(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "use.c"
    source.write_text(
        '#include "mla_deploy/cuda.h"\n'
        "int main(void) { mla_cuda_attention a = {sizeof a}; return a.size != sizeof a; }\n"
    )
    include = ROOT / "runtime" / "include"
    command = [compiler, "-std=c99", "-Wall", "-Werror", f"-I{include}", "-fsyntax-only"]
    subprocess.run([*command, str(source)], check=True)


SIZES = AttentionSizes(
    batch=1, steps=1, table_pages=1, heads=2, nope=16, rank=256, rope=16, v=8, cache_format="int4"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 320}, "kv_lora_rank is 320; allowed: 256 or 512"),
        ({"rope": 128}, "qk_rope_head_dim is 128; allowed: 16, 32, 48 or 64"),
        ({"heads": 129}, "heads is 129; allowed: 1 to 128"),
        ({"nope": 20}, "qk_nope_head_dim is 20; allowed: a multiple of 8"),
        ({"v": 0}, "v_head_dim is 0"),
        ({"splits": 1000}, "splits is 1000; allowed: 0"),
        ({"batch": -1}, "batch is -1"),
        ({"cache_format": "fp32"}, "do not know this cache format"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    kernels = CudaKernels(build_emulation())
    with pytest.raises(CudaError, match=message):
        kernels.workspace_bytes(dataclasses.replace(SIZES, **changes))


@pytest.mark.parametrize("cache_format", ["int4", "int8", "fp16"])
def test_a_bound_of_the_workspace_holds_for_smaller_calls(cache_format: str) -> None:
    kernels = CudaKernels(build_emulation())

    def bound(sizes: AttentionSizes) -> int:
        found = ctypes.c_size_t()
        call = ctypes.byref(cuda._describe(sizes))
        assert not kernels._library.mla_cuda_workspace_bound(call, ctypes.byref(found))
        return found.value

    def draw(most: int, least: int = 1) -> int:
        return int(torch.randint(least, most + 1, ()))

    without_pages = AttentionSizes(
        batch=1, steps=300, table_pages=0, heads=1, nope=128, rank=512, rope=64, v=128,
        cache_format=cache_format, mode="expanded",
    )  # fmt: skip
    assert kernels.workspace_bytes(without_pages) <= bound(without_pages)
    for _ in range(200):
        sizes = AttentionSizes(
            batch=draw(4), steps=draw(300), table_pages=draw(600, 0), heads=draw(128), nope=16,
            rank=256 * draw(2), rope=16 * draw(4), v=8, cache_format=cache_format,
            mode=MODES[draw(2, 0)],
        )  # fmt: skip
        smaller = dataclasses.replace(
            sizes, batch=draw(sizes.batch), steps=draw(sizes.steps),
            table_pages=draw(sizes.table_pages, 0),
        )  # fmt: skip
        assert kernels.workspace_bytes(smaller) <= bound(smaller) <= bound(sizes)


@pytest.mark.parametrize("cache_format", ["int4", "int8", "fp16"])
@pytest.mark.parametrize(("rank", "rope"), [(256, 16), (512, 64)])
def test_the_parts_are_those_of_the_record(cache_format: str, rank: int, rope: int) -> None:
    class Part(ctypes.Structure):
        _fields_ = (("element_bytes", ctypes.c_int32), ("page_bytes", ctypes.c_int64))

    kernels = CudaKernels(build_emulation())
    found, count = (Part * 5)(), ctypes.c_int32()
    sizes = dataclasses.replace(SIZES, rank=rank, rope=rope, cache_format=cache_format)
    call = ctypes.byref(cuda._describe(sizes))
    assert not kernels._library.mla_cuda_cache_parts(call, found, ctypes.byref(count))
    expected = cache_record(cache_format).parts(rank, rope)
    assert [(one.element_bytes, one.page_bytes) for one in found[: count.value]] == [
        (part.dtype.itemsize, 64 * part.bytes_per_token) for part in expected
    ]


def test_null_pointers_are_refused() -> None:
    kernels = CudaKernels(build_emulation())
    with pytest.raises(CudaError, match="kv is null"):
        kernels.latent_attention(SIZES, {}, [], 1, softmax_scale=1.0)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CudaError, match="cannot be loaded"):
        CudaKernels(tmp_path / "absent.so")
