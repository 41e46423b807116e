"""The TensorRT plugin in tests: compiled against TensorRT's headers, with emulated kernels."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.cuda import INCLUDES, ROOT, build_emulation

SOURCES = ROOT / "runtime" / "csrc" / "tensorrt"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def headers() -> list[str]:
    """Folders with the headers of TensorRT and CUDA; skips the test where there are none."""
    root = os.environ.get("TENSORRT_ROOT")
    if root is None:
        pytest.skip("needs TensorRT's headers: set TENSORRT_ROOT")
    found = []
    for name, folders in (
        ("NvInferRuntime.h", [Path(root), Path(root) / "include"]),
        ("cuda_runtime_api.h", [CUDA / "include", Path("/usr/include")]),
    ):
        folder = next((one for one in folders if (one / name).is_file()), None)
        if folder is None:
            pytest.skip(f"needs {name}: it is not in {', '.join(map(str, folders))}")
        found.append(f"-isystem{folder}")
    return found


def built_plugin(*more: Path, kind: str = "so") -> Path:
    """The plugin, or with `more` sources a program that has its code, built anew where a source has
    changed. The emulated kernels lie beside it, under the name of the real ones."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: set CXX")
    kernels = build_emulation()
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]
    flags += [*INCLUDES, *headers()]
    sources = [*sorted(SOURCES.glob("*.cpp")), *more]
    digest = hashlib.sha256(" ".join((compiler, *flags, str(kernels))).encode())
    for file in (*sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "tensorrt-plugin" / digest.hexdigest()[:16]
    target = folder / ("libmla_deploy_tensorrt.so" if kind == "so" else "program")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libmla_deploy_cuda.so"
    shutil.copy(kernels, library)
    private = folder / str(os.getpid())  # workers of pytest may build at once
    shape = ["-shared", f"-Wl,--version-script={SOURCES / 'exports.map'}", "-Wl,--no-undefined"]
    command = [compiler, *flags, *(shape if kind == "so" else []), *map(str, sources)]
    command += [str(library), "-Wl,-rpath,$ORIGIN", "-o", str(private)]
    subprocess.run(command, check=True)
    private.replace(target)
    return target
