"""The GPU of `cuda_double.cpp`: its library, bundles for it, and engines on it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cpp.core_abi import BUILD, ROOT, Api, EngineHandle, onnxruntime_library, run

from mla_deploy.runtime import ops_library

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def double_library() -> Path:
    """The library, built once a session; without a compiler the test is skipped."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    cache = (BUILD / "CMakeCache.txt").read_text()  # of libmla_deploy.so, which was built before
    headers = cache.partition("MLA_ONNXRUNTIME_INCLUDE:")[2].partition("=")[2].partition("\n")[0]
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = BUILD / f"cuda_double.{digest}.so"
    flags = ["-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-Wall", "-Wextra"]
    if not library.exists():
        private = library.with_suffix(f".{os.getpid()}")  # workers of pytest may build at once
        include = [f"-I{ROOT / 'runtime/include'}", f"-isystem{headers}"]
        run([compiler, *flags, *include, str(SOURCE), "-o", str(private)])
        private.replace(library)
    os.environ["MLA_TEST_ONNXRUNTIME"] = str(onnxruntime_library())
    return library


def fail_after(operations: int) -> None:
    """Let the operation on memory after so many more fail; -1: none."""
    ctypes.CDLL(str(double_library())).double_fail_after(ctypes.c_int64(operations))


def recordings() -> int:
    """How many recordings of a step engines have made in this process."""
    count: int = ctypes.CDLL(str(double_library())).double_recordings()
    return count


def for_cuda(bundle: Path) -> Path:
    """The bundle as if it had been exported for a GPU, in a folder beside it."""
    twin = bundle.with_name(bundle.name + "-cuda")
    shutil.rmtree(twin, ignore_errors=True)
    shutil.copytree(bundle, twin)
    manifest = json.loads((twin / "manifest.json").read_text())
    (twin / "manifest.json").write_text(json.dumps(manifest | {"cuda": {"dtype": "float16"}}))
    return twin


class CudaApi(Api):
    """The library, with engines on the double's GPU."""

    def engine(self, bundle: Path | str, **options: Any) -> EngineHandle:
        library = double_library()
        given = {"onnxruntime_library": library, "cuda_library": library, "device": "cuda"}
        given["ops_library"] = ops_library()  # with which steps of one token are recorded
        return super().engine(for_cuda(Path(bundle)), **(given | options))
