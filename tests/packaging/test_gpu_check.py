"""`tools/gpu_check.sh` where there is no GPU: which stages it runs, in which order, and on what.

What it calls is replaced by a program that writes its arguments down.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STAGES = {  # what tells the command of each, in the order in which they run
    "wheels": "install -q --no-index --no-deps .whl/some.whl",
    "install": "install -q --no-index --no-deps --no-build-isolation .",
    "tests": "--durations=10 -m gpu",
    "prompts": "benchmarks/cuda_prompts.py",
    "memcheck": "--tool memcheck",
    "racecheck": "--tool racecheck",
    "benchmark": "benchmarks/cuda_attention.py",
    "end_to_end": "test_cuda_end_to_end.py",
    "speed": "benchmarks/make_synthetic.py",
    "tensorrt_probe": "tools/tensorrt_probe.py",
    "tensorrt": "test_tensorrt.py",
}
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" "| $LD_LIBRARY_PATH | ${PYTORCH_NO_CUDA_MEMORY_CACHING:-}" >>"$STUB_LOG"
case "$*" in
    *compute_cap*) echo 9.0 ;;
    "-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *purelib*) dirname "$0" ;;
    *nvidia/*) exec "$STUB_PYTHON" "$@" ;;
esac
[ -z "${STUB_FAILS:-}" ] || [[ "$*" != *"$STUB_FAILS"* ]]
"""


class Checkout:
    """A folder with the script, and stubs on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        for name in ("tools", "bin", ".whl", "packages/nvidia/cublas/lib"):
            (folder / name).mkdir(parents=True)
        (folder / ".whl" / "some.whl").touch()
        shutil.copy(SCRIPT, folder / "tools")
        for name in ("nvidia-smi", "python3", "compute-sanitizer"):
            stub = folder / "bin" / name
            stub.write_text(STUB)
            stub.chmod(0o755)

    def run(self, **settings: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        changes = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": str(self.folder),
            "PYTHONPATH": str(self.folder / "packages"),
            "STUB_LOG": str(self.log),
            "STUB_PYTHON": sys.executable,
        }
        ours = ("STAGES", "MLA_CUDA_TARGETS")
        others = {name: value for name, value in os.environ.items() if name not in ours}
        return subprocess.run(
            ["bash", self.folder / "tools" / "gpu_check.sh"],
            env={**others, **changes, **settings},
            capture_output=True,
            text=True,
            check=False,
        )

    def ran(self) -> list[str]:
        """The stages whose commands were called."""
        log = self.log.read_text()
        found = {name: log.find(sign) for name, sign in STAGES.items() if sign in log}
        return sorted(found, key=lambda name: found[name])

    def line(self, stage: str) -> str:
        """What the stage's command got."""
        lines = self.log.read_text().splitlines()
        return next(line for line in lines if STAGES[stage] in line)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_all_stages_run_in_order(checkout: Checkout) -> None:
    done = checkout.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"== (\w+): exit 0", done.stdout) == list(STAGES)
    assert "== 0 stages failed" in done.stdout
    assert checkout.ran() == list(STAGES)


def test_stages_can_be_chosen(checkout: Checkout) -> None:
    done = checkout.run(STAGES="racecheck tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkout.ran() == ["wheels", "install", "tests", "racecheck"]


def test_a_stage_that_does_not_exist_is_refused(checkout: Checkout) -> None:
    done = checkout.run(STAGES="tests test")
    assert done.returncode == 2
    assert "STAGES names test; allowed: some of tests prompts memcheck" in done.stderr
    assert checkout.ran() == []


def test_a_stage_that_fails_is_counted(checkout: Checkout) -> None:
    done = checkout.run(STUB_FAILS=STAGES["prompts"])
    assert done.returncode == 1
    assert "== prompts: exit 1" in done.stdout
    assert "== 1 stages failed" in done.stdout
    assert checkout.ran() == list(STAGES)


def test_the_build_is_its_own(checkout: Checkout) -> None:
    checkout.run(STAGES="tests")
    line = checkout.line("install")
    assert "-C build-dir=build/gpu-check" in line
    assert "MLA_CUDA_TARGETS=90" in line
    assert "MLA_TENSORRT" not in line
    headers = checkout.folder / "build" / "tensorrt-headers" / "include"
    headers.mkdir(parents=True)
    (headers / "NvInferRuntime.h").touch()
    checkout.run(STAGES="tests", MLA_CUDA_TARGETS="80")
    line = checkout.line("install")
    assert "MLA_CUDA_TARGETS=80" in line
    assert "-C cmake.define.MLA_TENSORRT=ON" in line


def test_libraries_of_packages_are_found(checkout: Checkout) -> None:
    checkout.run(STAGES="end_to_end")
    folder = checkout.folder / "packages" / "nvidia" / "cublas" / "lib"
    assert str(folder) in checkout.line("end_to_end").split("|")[1]


def test_the_sanitizers_see_each_allocation_and_all_kernels(checkout: Checkout) -> None:
    checkout.run(STAGES="memcheck racecheck")
    for stage in ("memcheck", "racecheck"):
        assert checkout.line(stage).split("|")[2].strip() == "1"
    arguments, chosen = checkout.line("memcheck").split("|")[0].split(" -k ")
    files = re.findall(r"tests/\S+", arguments)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files, "-k", chosen.strip()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    print(*found, sep="\n")
    assert all("gpu" in line for line in found)
    expanded = [line.partition("::")[2] for line in found if "cuda_expanded" in line]
    names = {line.partition("[")[0] for line in expanded}
    assert names == {
        "test_shapes",
        "test_sequences_at_the_edges_of_tiles_and_chunks",
        "test_long_calls_run_in_rounds",
    }
    shapes = [line for line in expanded if line.startswith("test_shapes")]
    assert any("heads=2, nope=128, rank=512, rope=64, v=128" in line for line in shapes)
    assert any("nope=192, rank=512, rope=64, v=256" in line for line in shapes)


def test_what_is_said_of_the_limits_is_their_sum() -> None:
    script = SCRIPT.read_text()
    limits = {name: int(limit) for name, limit in re.findall(r"\[(\w+)\]=(\d+)", script)}
    assert list(limits) == list(STAGES)
    total = sum(limits.values())
    tensorrt = limits["tensorrt"] + limits["tensorrt_probe"]
    assert f"add up to {total:,} seconds, of which {tensorrt}" in script
    page = (ROOT / "docs" / "cuda.md").read_text()
    told = dict(re.findall(r"`(\w+)` (\d+)", page[page.index("limits of its stages") :]))
    assert {name: int(limit) for name, limit in told.items()} == limits
    assert f"{total:,} in all" in page
