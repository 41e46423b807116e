"""Threads that share an engine, under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cpp.builds import sanitized_build
from cpp.core_abi import ROOT, onnxruntime_library, run


@pytest.mark.slow
def test_concurrent_sessions_have_no_data_races(toy: Any, tmp_path: Path) -> None:
    build = sanitized_build("tests-tsan", "thread", "mla_deploy")
    library = build / "csrc" / "core" / "libmla_deploy.so"
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
