"""Registers, spills and stack of the CUDA kernels, as ptxas reports them. No GPU needed.

python tools/cuda_resources.py                      # all targets; minutes
python tools/cuda_resources.py --targets 86 --sources attend_int4
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RUNTIME = Path(__file__).resolve().parents[1] / "runtime"
SOURCES = ("attend_int4", "attend_int8", "attend_fp16", "expanded", "latent_attention")
TARGETS = ("80", "86", "87", "89", "90", "110", "120")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target."""

    target: str
    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int  # stored and loaded


def demangled(name: str) -> str:
    """`Attend<Int4, 512, 1, 64>` of a mangled entry point."""
    attend = re.search(r"6AttendINS\d_\d+(\w+?)FormatELi(\d+)ELi(\d+)ELi(\d+)E", name)
    if attend:
        record, rank, tiles, rope = attend.groups()
        return f"Attend<{record}, {rank}, {tiles}, {rope}>"
    prepare = re.search(r"7PrepareILNS_?\d_11CacheFormatE(\d)ELi(\d+)E", name)
    if prepare:
        return f"Prepare<{('int4', 'int8', 'fp16')[int(prepare[1])]}, {prepare[2]}>"
    matmul = re.search(r"10HeadMatmulILi(\d+)EE\d+(Queries|Outputs)E", name)
    if matmul:
        return f"HeadMatmul<{matmul[1]}>::{matmul[2]}"
    expanded = re.search(r"8ExpandedILi(\d+)ELi(\d+)ELi(\d+)E", name)
    if expanded:
        return f"Expanded<{', '.join(expanded.groups())}>"
    unpack = re.search(r"6UnpackILNS_?\d_11CacheFormatE(\d)E", name)
    if unpack:
        return f"Unpack<{('int4', 'int8', 'fp16')[int(unpack[1])]}>"
    return next((one for one in ("Merge", "Expand") if f"{len(one)}{one}E" in name), name)


def read_report(report: str) -> Iterator[Resources]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    for block in report.split("Compiling entry function ")[1:]:
        head = re.match(r"'(\S+)' for 'sm_(\w+)'", block)
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        registers = re.search(r"Used (\d+) registers", block)
        if head is None or stack is None or registers is None:
            raise ValueError(f"ptxas says something new:\n{block}")
        stored, loaded = int(stack[2]), int(stack[3])
        yield Resources(
            head[2], demangled(head[1]), int(registers[1]), int(stack[1]), stored + loaded
        )


def measure(nvcc: str, source: str, target: str) -> list[Resources]:
    """Compiles one file for one target.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(nvcc, "-std=c++17", "-O3", f"-arch=sm_{target}", "-Xptxas", "-v"),
            *(f"-I{RUNTIME / 'csrc'}", f"-I{RUNTIME / 'include'}"),
            *("-c", str(RUNTIME / "csrc" / "cuda" / f"{source}.cu"), "-o", f"{folder}/out.o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(read_report(done.stdout + done.stderr))


def main(arguments: Sequence[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        parser.error("nvcc is not on the PATH: install CUDA 13")
    rows: dict[str, dict[str, Resources]] = {}
    for source in options.sources:
        for target in options.targets:
            for found in measure(nvcc, source, target):
                rows.setdefault(found.kernel, {})[target] = found
    print("registers a thread; +n: bytes spilled\n")
    print("| kernel | " + " | ".join(f"sm_{target}" for target in options.targets) + " |")
    print("|---|" + "---|" * len(options.targets))
    for kernel, by_target in rows.items():
        cells = [
            f"{found.registers}" + (f" +{found.spill_bytes}" if found.spill_bytes else "")
            for found in (by_target[target] for target in options.targets)
        ]
        print(f"| `{kernel}` | " + " | ".join(cells) + " |")
    spilled = any(f.spill_bytes for by_target in rows.values() for f in by_target.values())
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
