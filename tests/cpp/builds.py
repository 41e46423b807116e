"""Builds of runtime/ with sanitizers or for another machine, each in a folder of its own in build/,
made once and shared by test processes. What is not to be had here skips the test."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cpp.core_abi import FAST, ROOT, run


@functools.cache
def sanitizer_works(sanitizers: str) -> bool:
    """Whether a program that was built with them runs here."""
    folder = ROOT / "build" / "tests-probe"
    folder.mkdir(parents=True, exist_ok=True)
    probe, program = folder / "probe.cpp", folder / f"probe-{sanitizers}-{os.getpid()}"
    probe.write_text("int main() {}\n")
    command = [os.environ.get("CXX", "c++"), f"-fsanitize={sanitizers}", probe, "-o", program]
    if shutil.which(command[0]) is None:
        return False
    built = subprocess.run(command, capture_output=True).returncode == 0
    works = built and subprocess.run([program], capture_output=True).returncode == 0
    program.unlink(missing_ok=True)
    return works


def sanitized_build(folder: str, sanitizers: str, *targets: str) -> Path:
    """runtime/ with sanitizers, and fuzz targets if any are named."""
    if not sanitizer_works(sanitizers):
        pytest.skip(f"programs with -fsanitize={sanitizers} do not work here")
    flags = ["-DMLA_FUZZ=ON", "-DMLA_OPS=OFF", f"-DMLA_SANITIZE={sanitizers}"]
    if "undefined" in sanitizers:  # optimising takes GCC minutes with all that is checked
        flags.append("-DCMAKE_CXX_FLAGS_RELEASE=-O0 -g1")
    return build(folder, [*FAST, *flags], targets)


def build(folder: str, choices: list[str], targets: tuple[str, ...] = ()) -> Path:
    """build/FOLDER, configured and built."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    out = ROOT / "build" / folder
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT / "runtime"), "-B", str(out), *generator, *choices]
        output = run([*configure, "-DMLA_PYTHON=OFF", f"-DPython_EXECUTABLE={sys.executable}"])
        if "libmla_deploy.so is left out" in output:
            pytest.skip("libmla_deploy.so cannot be built: " + output[-1500:])
        only = [flag for target in targets for flag in ("--target", target)]
        run(["cmake", "--build", str(out), *only])
    return out
