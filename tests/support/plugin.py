"""The TensorRT plugin in tests: compiled against TensorRT's headers, with emulated kernels."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mla_deploy.runtime.tensorrt_plugin import LIBRARY
from support.cuda import INCLUDES, ROOT, build_emulation

SOURCES = ROOT / "runtime" / "csrc" / "tensorrt"
TENSORRT = Path(os.environ.get("TENSORRT_ROOT", ROOT / "build" / "tensorrt-headers"))
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
KERNELS = "libmla_deploy_cuda.so"
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]


def headers() -> list[Path]:
    """Folders with the headers of TensorRT and CUDA; skips the test where there are none."""
    found = []
    for name, folders, hint in (
        (
            "NvInferRuntime.h",
            [TENSORRT, TENSORRT / "include"],
            "run tools/fetch_tensorrt_headers.py, or set TENSORRT_ROOT",
        ),
        ("cuda_runtime_api.h", [CUDA / "include", Path("/usr/include")], "set CUDA_HOME"),
    ):
        folder = next((one for one in folders if (one / name).is_file()), None)
        if folder is None:
            pytest.skip(f"needs {name}, not in {', '.join(map(str, folders))}: {hint}")
        found.append(folder)
    return found


def built_plugin() -> Path:
    """The plugin, built anew where a source has changed. The emulated kernels lie beside it, under
    the name of the real ones."""
    kernels = build_emulation()
    exports = SOURCES / "exports.map"
    sources = sorted(SOURCES.glob("*.cpp"))
    digest = hashlib.sha256(" ".join((*FLAGS, str(kernels))).encode())
    for file in (
        *sources,
        *sorted(SOURCES.glob("*.h")),
        exports,
        headers()[0] / "NvInferVersion.h",
    ):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "tensorrt-plugin" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / KERNELS).exists():
        private = _private(folder / KERNELS)
        shutil.copy(kernels, private)
        private.replace(folder / KERNELS)
    shape = ["-shared", f"-Wl,--version-script={exports}", "-Wl,--no-undefined"]
    return _compiled(folder / LIBRARY, [*shape, *sources, folder / KERNELS])


def built_program(source: Path) -> Path:
    """A program that calls the plugin."""
    plugin = built_plugin()
    digest = hashlib.sha256(source.read_bytes())
    for file in sorted(source.parent.glob("*.h")):
        digest.update(file.read_bytes())
    program = plugin.parent / f"{source.stem}-{digest.hexdigest()[:16]}"
    return _compiled(program, [source, plugin, plugin.parent / KERNELS])


def _compiled(target: Path, arguments: list[str | Path]) -> Path:
    """The target, compiled if it is not there yet."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: set CXX")
    if not target.exists():
        private = _private(target)
        system = [f"-isystem{folder}" for folder in headers()]
        command = [compiler, *FLAGS, *INCLUDES, *system, *arguments, "-Wl,-rpath,$ORIGIN"]
        subprocess.run([*command, "-o", private], check=True)
        private.replace(target)
    return target


def _private(file: Path) -> Path:
    """Its place while it is made: pytest's workers may build at once."""
    return file.with_name(f"{file.name}.{os.getpid()}")
