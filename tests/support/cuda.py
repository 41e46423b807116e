"""Where the CUDA kernels run in a test: on a GPU, or emulated on the host.

The emulation is the same source, compiled by a C++ compiler (`runtime/csrc/cuda/emulation.h`): a
block's threads are fibers, the tensor cores' product and the asynchronous copies are written out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mla_deploy.runtime.cuda import (
    AttentionSizes,
    CudaError,
    CudaKernels,
    Tensor,
    cuda_library,
)
from support.attention_case import AttentionCase

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "runtime" / "csrc" / "cuda"
INCLUDES = [f"-I{ROOT / 'runtime' / folder}" for folder in ("csrc", "include")]
HOST_SOURCES = ("call.cpp", "emulation.cpp", "memory.cpp", "runtime.cpp", "status.cpp")
KERNELS = ("latent_attention", "attend_int4", "attend_int8", "attend_fp16", "expanded")
# Memory is read as other types than it was written in; nvcc assumes nothing there, nor may we.
FLAGS = ["-std=c++17", "-O0", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]


def build_emulation(*flags: str) -> Path:
    """The emulated library, built anew where a source has changed.

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: set CXX")
    flags = (*FLAGS, *flags, "-DMLA_CUDA_EMULATION", "-fvisibility=hidden", *INCLUDES)
    headers = [*SOURCES.iterdir(), ROOT / "runtime/include/mla_deploy/cuda.h"]
    digest = hashlib.sha256(" ".join((compiler, *flags)).encode())
    for file in sorted(path for path in headers if path.is_file()):
        digest.update(file.read_bytes())
    library = ROOT / "build" / "cuda-emulation" / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    private = library.with_suffix(f".{os.getpid()}")  # workers of pytest may build at once
    private.mkdir()
    sources = (*(f"{name}.cu" for name in KERNELS), *HOST_SOURCES)
    objects = [str(private / f"{source}.o") for source in sources]

    def compile_one(source: str, target: str) -> None:
        command = [compiler, *flags, "-x", "c++", "-c", str(SOURCES / source), "-o", target]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    linked = private / "library.so"
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", str(linked)], check=True)
    linked.replace(library)
    shutil.rmtree(private)
    return library


def emulation_wavefronts(forget: bool = False) -> list[tuple[int, int]]:
    """Wavefronts of shared memory a launch: taken, and had there been no bank conflict."""
    call = ctypes.CDLL(str(build_emulation())).mla_cuda_emulation_wavefronts
    taken, ideal = ctypes.c_int64(), ctypes.c_int64()
    found: list[tuple[int, int]] = []
    launch = -1 if forget else 0
    while call(launch + len(found), ctypes.byref(taken), ctypes.byref(ideal)) == 0:
        found.append((taken.value, ideal.value))
    return found


def gpu_machine() -> Machine:
    """Skips the test where there is no GPU, or no kernels for it."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a torch that knows it")
    try:
        library = cuda_library()
    except CudaError as error:
        pytest.skip(str(error))
    return Machine(library, "cuda")


class Machine:
    """The kernels and the memory that they work on."""

    def __init__(self, library: Path, device: str) -> None:
        self.kernels = CudaKernels(library)
        self.device = torch.device(device)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy in the kernels' memory."""
        return tensor.to(self.device).contiguous().clone()

    def poisoned(self, size: int) -> torch.Tensor:
        """Bytes aligned to 256 that are NaN as any float."""
        spare = torch.full((size + 256,), 0xFF, dtype=torch.uint8, device=self.device)
        start = -spare.data_ptr() % 256
        return spare[start : start + size]


def run_case(
    machine: Machine,
    case: AttentionCase,
    *,
    dtype: torch.dtype = torch.float32,
    mode: str = "auto",
    splits: int = 0,
    padding: int = 0,
    append_only: bool = False,
    expect_problem: int = 0,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The kernel's output on a poisoned array, and its cache; the case's own cache is kept.

    Args:
        dtype: of q, kv and output.
        padding: elements between the rows of two tokens, in which nothing may be written.
    """
    d = case.dims
    sizes = AttentionSizes(
        batch=case.batch,
        steps=case.steps,
        table_pages=case.block_table.shape[1],
        heads=d.heads,
        nope=d.nope,
        rank=d.rank,
        rope=d.rope,
        v=d.v,
        cache_format=case.cache_format,
        mode=mode,
        splits=splits,
    )
    q, kv, cos, sin = case.new_inputs()
    name = str(dtype).removeprefix("torch.")
    held: dict[str, torch.Tensor] = {"cos": machine.place(cos), "sin": machine.place(sin)}
    for key, value in (("q", q), ("kv", kv)):
        held[key] = machine.place(torch.nn.functional.pad(value.to(dtype), (0, padding)))
    width = d.heads * d.v
    poison = torch.full((case.batch, case.steps, width + padding), torch.nan, dtype=dtype)
    held["output"] = machine.place(poison)
    held["w_uk"], held["w_uv"] = machine.place(case.w_uk.half()), machine.place(case.w_uv.half())
    held["block_table"] = machine.place(case.block_table)
    held["past_lengths"], held["new_lengths"] = machine.place(case.past), machine.place(case.new)
    tensors = {
        key: Tensor(value.data_ptr(), name, value.shape[-1])
        if key in ("q", "kv", "output")
        else Tensor(value.data_ptr())
        for key, value in held.items()
    }
    cache = [machine.place(part) for part in case.cache]
    workspace = machine.poisoned(machine.kernels.workspace_bytes(sizes))
    problem = machine.place(torch.zeros(1, dtype=torch.int32))
    machine.kernels.latent_attention(
        sizes,
        tensors,
        [part.data_ptr() for part in cache],
        cache[0].shape[0],
        softmax_scale=case.scale,
        latent_norm_epsilon=case.epsilon,
        workspace=workspace.data_ptr(),
        workspace_bytes=workspace.numel(),
        problem=problem.data_ptr(),
        append_only=append_only,
    )
    output = held["output"].cpu()
    assert int(problem) == expect_problem
    if padding:
        assert output[..., width:].isnan().all(), "written between the rows"
    output = output[..., :width].float()
    if not append_only and not expect_problem:
        assert output.isfinite().all(), "an output was not written"
    return output, [part.cpu() for part in cache]


def check(
    machine: Machine, case: AttentionCase, mode: str = "absorbed", splits: int = 0
) -> torch.Tensor:
    """The kernel's output, held against both oracles."""
    output, cache = run_case(machine, case, mode=mode, splits=splits)
    title = f"{case.cache_format} {mode} {case.dims}"
    kernel, cache_alone, total = case.errors(output, cache, title)
    # Queries, probabilities and merged latents are rounded to half once each; int8 latents too.
    assert kernel.relative < 3e-3
    assert kernel.cosine > 0.9999
    if case.cache_format != "fp16":
        # Expanded, latents are rounded to half too: constants have hardly another error.
        rounding = 2e-4 if mode == "expanded" else 0
        assert total.relative < cache_alone.relative * 1.1 + rounding
    is_padding = torch.arange(case.steps) >= case.new.unsqueeze(1)
    assert (output[is_padding] == 0).all()
    return output


def cache_pages(case: AttentionCase) -> Sequence[int]:
    """Pages that the case's sequences use."""
    lengths = (case.past + case.new).tolist()
    return [int(case.block_table[b, m]) for b, n in enumerate(lengths) for m in range(-(-n // 64))]
