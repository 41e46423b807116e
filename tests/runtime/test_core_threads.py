"""Threads that share an engine, under ThreadSanitizer."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cpp.core_abi import ROOT, onnxruntime_library, run

BUILD = ROOT / "build" / "tests-tsan"


def tsan_library() -> Path:
    """libmla_deploy.so, built with -DMLA_SANITIZE=thread; or the test is skipped."""
    BUILD.mkdir(parents=True, exist_ok=True)
    probe = BUILD / "probe.cpp"
    probe.write_text("int main() {}\n")
    compiler = os.environ.get("CXX", "c++")
    for tool in ("cmake", compiler):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    command = [compiler, "-fsanitize=thread", str(probe), "-o", str(BUILD / "probe")]
    built = subprocess.run(command, capture_output=True).returncode == 0
    if not built or subprocess.run([BUILD / "probe"], capture_output=True).returncode != 0:
        pytest.skip("ThreadSanitizer does not work here")
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        choices = ["-DMLA_PYTHON=OFF", "-DMLA_ENGINE=AUTO", "-DMLA_SANITIZE=thread"]
        choices.append("-DCMAKE_BUILD_TYPE=RelWithDebInfo")
        configure = ["cmake", "-S", str(ROOT / "runtime"), "-B", str(BUILD), *generator, *choices]
        output = run([*configure, f"-DPython_EXECUTABLE={sys.executable}"])
        if "libmla_deploy.so is left out" in output:
            pytest.skip("headers of onnxruntime or nlohmann/json are not to be had")
        run(["cmake", "--build", str(BUILD), "--target", "mla_deploy"])
    return BUILD / "csrc" / "core" / "libmla_deploy.so"


@pytest.mark.slow
def test_concurrent_sessions_have_no_data_races(toy: Any, tmp_path: Path) -> None:
    library = tsan_library()
    program = tmp_path / "concurrent_sessions"
    source = ROOT / "tests" / "cpp" / "concurrent_sessions.cpp"
    flags = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-fsanitize=thread", "-pthread"]
    include = f"-I{ROOT / 'runtime' / 'include'}"
    run(["c++", *flags, include, str(source), str(library), "-o", str(program)])
    result = subprocess.run(
        [program, toy.path, onnxruntime_library(), tmp_path],
        env=os.environ | {"LD_LIBRARY_PATH": str(library.parent), "TSAN_OPTIONS": "exitcode=66"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "ThreadSanitizer" not in result.stderr, result.stderr[:4000]
    assert (result.returncode, result.stdout) == (0, "no failure\n"), result.stderr
