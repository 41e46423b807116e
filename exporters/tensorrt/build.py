"""Builds engines from an ONNX file, each in a process of its own, watched."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from mla_deploy.errors import MlaError, UsageError
from mla_deploy.exporters.tensorrt.capability import Capability, compute_capability
from mla_deploy.gpu import gpu_target
from mla_deploy.manifest import ProfileInfo, TensorInfo
from mla_deploy.progress import Progress

MEMORY_FACTOR = 3.3
"""Bytes of memory that a build takes for a byte of weights, at its peak; measured."""
MEMORY_BASE = 600 << 20
"""What it takes besides."""
TIMEOUT = 3600.0


class BuildError(MlaError):
    """An engine that could not be built."""


@dataclass(frozen=True)
class EngineReport:
    """What a build made.

    Attributes:
        version: of the TensorRT that built it.
        peak_bytes: of memory, of the build.
        scratch_bytes: of GPU memory besides weights and cache, for each profile.
        weights_bytes: of GPU memory.
    """

    target: str
    bytes: int
    version: str
    seconds: float
    peak_bytes: int
    scratch_bytes: tuple[int, ...]
    weights_bytes: int


def check_backend(wanted: Capability, targets: Sequence[str]) -> None:
    """Whether engines for these GPUs can be built here.

    Raises:
        UsageError: TensorRT is not installed, is of another version, or builds only for a GPU that
            this machine has not.
    """
    if not _is_installed(wanted.module):
        pip = "pip install tensorrt-rtx"
        raise UsageError(
            f"{wanted.module} is not installed",
            hint="it comes with JetPack, or with NVIDIA's packages; --onnx-only needs none of it"
            if wanted.needs_device
            else f"{pip}; or export with --onnx-only",
        )
    found = _installed_version(wanted.module)
    if not found.startswith(wanted.versions):
        raise UsageError(
            f"this {wanted.module} is not the one that the graph is made for",
            found=found,
            allowed=", ".join(f"{one.rstrip('.')}" for one in wanted.versions),
            hint="choose another table with --compat",
        )
    if wanted.needs_device:
        present = gpu_target()
        for target in targets:
            if target != present:
                raise UsageError(
                    f"{wanted.module} builds for the GPU that it runs on",
                    found=f"{target}, and here is {present or 'no GPU'}",
                    hint="export with --onnx-only here and build on the device: docs/tensorrt.md",
                )


def needed_memory(weights: int) -> int:
    """Bytes of memory that a build with so many bytes of weights takes."""
    return int(MEMORY_FACTOR * weights) + MEMORY_BASE


def check_memory(weights: int) -> None:
    """Raise a BuildError where less memory is free than a build takes."""
    needed, free = needed_memory(weights), available_memory()
    if free < needed:
        raise BuildError(
            "there is too little memory to build the engine",
            found=f"{free / 1e9:.1f} GB free",
            allowed=f"{needed / 1e9:.1f} GB: {MEMORY_FACTOR} times the weights",
            hint="close other programs, add swap, or build on a larger machine",
        )


def available_memory() -> int:
    """Bytes that a new process can have: the system's, or the control group's if that is less."""
    free = _meminfo("MemAvailable") + _meminfo("SwapFree")
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return free


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def build_engine(
    onnx: Path,
    engine: Path,
    wanted: Capability,
    target: str,
    inputs: Sequence[TensorInfo],
    profiles: Sequence[ProfileInfo],
    *,
    plugin: Path | None = None,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    log: Path | None = None,
) -> EngineReport:
    """Build an engine.

    Args:
        onnx: the graph, its weights beside it.
        engine: file to write.
        plugin: the library that the graph needs, if any.
        timeout: seconds.
        log: file for everything that TensorRT says.

    Raises:
        BuildError: TensorRT refuses, crashes, or takes too long. No engine is left behind.
    """
    request = {
        "module": wanted.module,
        "onnx": str(onnx),
        "engine": str(engine),
        "compute_capability": compute_capability(target, wanted),
        "profiles": [_shapes(inputs, profile) for profile in profiles],
        "plugin": None if plugin is None else str(plugin),
        "log": None if log is None else str(log),
    }
    try:
        with _environment(wanted.module, plugin) as environment:
            result = _run(target, request, environment, timeout, progress)
    except BaseException:
        engine.unlink(missing_ok=True)
        raise
    return EngineReport(
        target=target,
        bytes=engine.stat().st_size,
        version=result["version"],
        seconds=result["seconds"],
        peak_bytes=result["peak_bytes"],
        scratch_bytes=tuple(result["scratch_bytes"]),
        weights_bytes=max(result["weights_bytes"], default=0),
    )


def worker_command() -> list[str]:
    """The command that serves one request. By its path: `-m` would look in the current folder
    first, and find a checkout of this project in place of what is installed."""
    return [sys.executable, str(Path(__file__).with_name("worker.py"))]


@contextmanager
def _environment(module: str, plugin: Path | None) -> Iterator[dict[str, str]]:
    """The worker's: with a plugin, TensorRT-RTX's parser opens its main library under a name that
    the package does not have."""
    spec = importlib.util.find_spec(f"{module}_libs") if plugin is not None else None
    if spec is None or not spec.submodule_search_locations:
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory() as links:
        for library in Path(spec.submodule_search_locations[0]).glob("*.so.*"):
            (Path(links) / library.name[: library.name.index(".so") + 3]).symlink_to(library)
        others = os.environ.get("LD_LIBRARY_PATH")
        path = links if not others else f"{links}{os.pathsep}{others}"
        yield os.environ | {"LD_LIBRARY_PATH": path}


def _run(
    target: str,
    request: dict[str, Any],
    environment: dict[str, str],
    timeout: float,
    progress: Progress | None,
) -> dict[str, Any]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            worker_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            text=True,
        )
        result = _result(target, process, request, timeout, progress)
        if result is not None:
            return result
        raise BuildError(
            f"the build for {target} ended without a result",
            found=f"exit status {process.returncode}{_last_line(said)}",
            hint="it may have been killed for want of memory: see the system's log",
        )


def _result(
    target: str,
    process: subprocess.Popen[str],
    request: dict[str, Any],
    timeout: float,
    progress: Progress | None,
) -> dict[str, Any] | None:
    """What the worker made; None if it ended without a word."""
    try:
        for message in _messages(process, json.dumps(request), timeout):
            if "progress" in message and progress is not None:
                progress(*message["progress"])
            elif "error" in message:
                raise BuildError(
                    f"TensorRT cannot build an engine for {target}",
                    found=str(message["error"]).strip()[:500],
                    hint="export with --onnx-only and see what `trtexec --onnx` says",
                )
            elif "result" in message:
                result: dict[str, Any] = message["result"]
                return result
        return None
    finally:
        process.kill()
        process.wait()


def _last_line(said: IO[bytes]) -> str:
    """Of what a worker wrote to standard error, to be put behind its exit status."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - 4000))
    lines = said.read().decode(errors="replace").split("\n")
    return next((f": {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")


def _messages(
    process: subprocess.Popen[str], request: str, timeout: float
) -> Iterator[dict[str, Any]]:
    """What the worker says, until it ends."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.close()
        except BrokenPipeError:  # it ended before it read; its status says the rest
            pass
        for line in process.stdout:
            lines.put(line)
        process.wait()
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + timeout
    while True:
        try:
            line = lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise BuildError(
                "the build takes too long",
                found=f"no engine after {timeout:.0f} s",
                hint="give it more with --timeout",
            ) from None
        if line is None:
            return
        try:
            yield json.loads(line)
        except ValueError:  # a library that prints
            continue


def _shapes(inputs: Sequence[TensorInfo], profile: ProfileInfo) -> dict[str, list[list[int]]]:
    """Least, usual and most shape of every input."""
    return {
        one.name: [
            [profile.extent(size)[which] if isinstance(size, str) else size for size in one.shape]
            for which in range(3)
        ]
        for one in inputs
    }


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name is no module


def _installed_version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:  # Debian's packages have no metadata
        return str(importlib.import_module(module).__version__)
