"""The fuzz targets of runtime/fuzz on their seeds, and on mutations of them, under ASan and UBSan.

libFuzzer, which looks for what these do not reach, is run by hand: runtime/fuzz/CMakeLists.txt.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cpp.builds import sanitized_build
from cpp.core_abi import onnxruntime_library

SEEDS = Path(__file__).resolve().parents[1] / "fuzz" / "seeds"
MUTATIONS = {"manifest": 3000, "session": 1000, "tokenizer": 600}


@pytest.mark.slow
@pytest.mark.parametrize("target", MUTATIONS)
def test_no_input_makes_a_fault(target: str, toy: Any, tmp_path: Path) -> None:
    folder = sanitized_build("tests-asan", "address,undefined", *(f"fuzz_{t}" for t in MUTATIONS))
    seeds = sorted((SEEDS / target).iterdir())
    assert seeds
    order = random.randrange(1 << 30)
    command = [folder / "fuzz" / f"fuzz_{target}", str(MUTATIONS[target]), str(order), *seeds]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ
        | {
            "MLA_FUZZ_BUNDLE": str(toy.path),
            "MLA_FUZZ_ONNXRUNTIME": str(onnxruntime_library()),
            "ASAN_OPTIONS": "detect_leaks=0",  # onnxruntime's own, at the end
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"random numbers from {order}\n{result.stderr[:4000]}"
    assert result.stdout == f"{len(seeds)} seeds and {MUTATIONS[target]} mutations\n"
