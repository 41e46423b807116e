"""The kernels cross-built for aarch64 and run under qemu: NEON, with and without dot products."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "runtime" / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
COMMON = [
    "absorbed",
    "dispatch",
    "expanded",
    "features",
    "latent_attention",
    "portable",
    "thread_pool",
    "weights",
]
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-DMLA_CPU_ARM", f"-I{CSRC}"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_agrees_with_the_portable_kernels(tmp_path: Path) -> None:
    sources = dict.fromkeys((*COMMON, "isa_neon"), FLAGS)
    sources["isa_neon_dotprod"] = [*FLAGS, "-march=armv8.2-a+dotprod"]
    objects = []
    for name, flags in sources.items():
        objects.append(str(tmp_path / f"{name}.o"))
        source = str(CSRC / "cpu" / f"{name}.cpp")
        subprocess.run([COMPILER, *flags, "-c", source, "-o", objects[-1]], check=True)
    program = str(tmp_path / "compare")
    main = str(Path(__file__).with_name("test_cpu_attention_compare.cpp"))
    subprocess.run(
        [COMPILER, *FLAGS, main, *objects, "-o", program, "-static", "-pthread"], check=True
    )
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon:" in done.stdout
    assert "neon_dotprod:" in done.stdout
