"""aarch64, cross-built and run under qemu-user: the kernels, and a program that runs a bundle."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from cpp.builds import build
from cpp.core_abi import FAST, ROOT, run

from mla_deploy.runtime import GenerationOptions, load

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TOOLCHAIN = ROOT / "runtime" / "cmake" / "aarch64-linux-gnu.cmake"
PROMPT = list(range(100, 120))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
    ),
]


@functools.cache
def cross_build() -> Path:
    choices = [f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", *FAST]
    return build("tests-aarch64", choices, ("all", "cpu_attention_compare"))


CPUINFO = """\
processor : 0
Features : fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x4
CPU part : 0xd0b
CPU revision : 1
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the emulated program finds its libraries, and a /proc/cpuinfo of its own kind: without
    it onnxruntime reads this machine's, and dies of it."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "lib").symlink_to("/usr/aarch64-linux-gnu/lib")
    (folder / "proc").mkdir()
    (folder / "proc" / "cpuinfo").write_text(CPUINFO)
    return folder


def emulate(cpu: str, root: Path, program: Path, *arguments: str) -> str:
    command = [EMULATOR, "-cpu", cpu, "-L", str(root), str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("cpu", "isas"), [("cortex-a72", {"neon"}), ("max", {"neon", "neon_dotprod", "neon_i8mm"})]
)
def test_neon_agrees_with_the_portable_kernels(cpu: str, isas: set[str], root: Path) -> None:
    output = emulate(cpu, root, cross_build() / "cpu_attention_compare")
    print(output)
    assert {line.split(":")[0] for line in output.splitlines() if ":" in line} == isas


@functools.cache
def onnxruntime_for_aarch64() -> Path:
    """The shared library in the wheel of the version that runs here."""
    folder = ROOT / "build" / "onnxruntime-aarch64"
    release = version("onnxruntime")
    if not (found := sorted(folder.glob(f"*{release}*/onnxruntime/capi/libonnxruntime.so.*"))):
        python = ["--python-version", platform.python_version(), "--only-binary=:all:"]
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *python]
        command += [*platforms, "--dest", str(folder), f"onnxruntime=={release}"]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip(f"pip cannot download onnxruntime {release} for aarch64")
        (wheel,) = folder.glob(f"onnxruntime-{release}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if "/libonnxruntime.so." in name]
            archive.extractall(folder / wheel.stem, names)
        wheel.unlink()
        found = [folder / wheel.stem / name for name in names]
    return found[-1]


def test_a_program_makes_the_tokens_that_it_makes_on_this_machine(
    tiny_bundle: Path, root: Path, tmp_path: Path
) -> None:
    library = onnxruntime_for_aarch64()
    prefix = tmp_path / "prefix"
    run(["cmake", "--install", str(cross_build()), "--component", "cpp", "--prefix", str(prefix)])
    assert (prefix / "lib" / "libmla_deploy_ops.so").is_file()
    source = shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "source")
    configure = ["cmake", "-S", str(source), "-B", str(tmp_path / "build")]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", f"-DCMAKE_FIND_ROOT_PATH={prefix}"]
    run([*configure, f"-Dmla_deploy_DIR={prefix}/lib/cmake/mla_deploy"])
    run(["cmake", "--build", str(tmp_path / "build"), "--target", "minimal"])
    arguments = [str(tiny_bundle), str(library), "8", *map(str, PROMPT)]
    output = emulate("max", root, tmp_path / "build" / "minimal", *arguments)
    expected = load(tiny_bundle, threads=1).generate(PROMPT, GenerationOptions(max_tokens=8))
    assert [int(line) for line in output.split()] == list(expected.tokens)
