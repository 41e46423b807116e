"""Times the native latent attention alone: decoding from memory, append, and prompts.

    python benchmarks/cpu_attention.py [--quick]

Each row is a process of `cpu_attention.cpp`, built here on first use. Decoding rotates over six
layers' caches, so that no L2 holds what is read, with random codes and a shuffled block table. The
rows are run `ROUNDS` times in turn and the quickest of the medians is given, with the spread of the
medians: on a shared machine the slow ones measure the neighbours.

Columns: milliseconds a call; millions of tokens x layers a second and core; what the int8 products
of latent and rope come to, as a share of the peak of the unit that runs them (AMX tiles, vpdpbusd),
measured in the same run; bytes of cache read a second, as a share of what plain reading and copying
reach in the same run; microseconds to append one token.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "benchmarks"
PROGRAM = BUILD / "cpu_attention_benchmark"
TOKENS = 32768
ROUNDS = 3
BYTES = {("int4", 512): 360, ("int4", 256): 216, ("int8", 512): 600, ("fp16", 512): 1152}
UNIT = {"amx": "amx_gops", "avx512_vnni": "vnni_gops"}

DECODE = [
    # isa, format, heads, rank
    *(("amx", "int4", heads, 512) for heads in (16, 20, 32, 40, 128)),
    ("amx", "int4", 16, 256),
    ("amx", "int8", 16, 512),
    ("amx", "fp16", 16, 512),
    *(("avx512_vnni", "int4", heads, 512) for heads in (16, 32, 128)),
    ("avx2_vnni", "int4", 16, 512),
    *(("avx2", "int4", heads, 512) for heads in (16, 20, 32, 40, 128)),
    ("avx2", "int4", 16, 256),
    ("avx2", "int8", 16, 512),
    ("avx2", "fp16", 16, 512),
]
PREFILL = [(0, 512), (8192, 512)]


def build() -> None:
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT / "runtime"), "-B", str(BUILD)]
    flags = ["-DMLA_PYTHON=OFF", "-DMLA_ENGINE=OFF", "-DMLA_OPS=OFF"]
    subprocess.run([*configure, *flags], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        ["cmake", "--build", str(BUILD), "--target", "cpu_attention_benchmark"],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def measure(*arguments: object) -> dict[str, float] | None:
    """The program's figures by name; None: this CPU lacks the instruction set."""
    done = subprocess.run(
        [str(PROGRAM), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None
    words = done.stdout.split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def best(rows: list[dict[str, float]], name: str) -> float:
    return min(row[name] for row in rows)


def decode_table(threads: int, quick: bool) -> None:
    rounds = 1 if quick else ROUNDS
    peaks: list[dict[str, float]] = []
    found: dict[tuple[str, str, int, int], list[dict[str, float]]] = {}
    for _ in range(rounds):
        if peak := measure("peak", threads):
            peaks.append(peak)
        for row in DECODE:
            isa, cache_format, heads, rank = row
            figures = measure(isa, cache_format, heads, rank, 64, TOKENS, threads, 24)
            if figures:
                found.setdefault(row, []).append(figures)
    peak = {name: max(p[name] for p in peaks) for name in peaks[0]}
    print(f"\n{threads} thread(s), {TOKENS} tokens, rope 64; " + ", ".join(
        f"{name} {value:.0f}" for name, value in peak.items()))  # fmt: skip
    print("| isa | cache | heads | rank | ms | spread | M/s a core | of peak | of read | of copy "
          "| append us |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (isa, cache_format, heads, rank), rows in found.items():
        ms = best(rows, "ms")
        spread = max(row["ms"] for row in rows) / ms
        rate = TOKENS / ms * 1e-3 / threads
        products = 2 * heads * (2 * rank + 64) * TOKENS / ms * 1e-6 / threads
        unit = UNIT.get(isa) if cache_format == "int4" else None
        share = f"{products / peak[unit]:.0%}" if unit and peak[unit] else ""
        read = BYTES[cache_format, rank] * TOKENS / ms * 1e-6
        print(
            f"| {isa} | {cache_format} | {heads} | {rank} | {ms:.2f} | {spread:.2f}x | {rate:.1f} "
            f"| {share} | {read / peak['read_gbs']:.0%} | {read / peak['copy_gbs']:.0%} "
            f"| {best(rows, 'append_us'):.1f} |"
        )


def prefill_table(threads: int) -> None:
    print(f"\nprompts of new tokens after past ones, 16 heads, rank 512, int4, {threads} thread(s)")
    print("| isa | past | new | absorbed ms | expanded ms | append ms |\n|---|---|---|---|---|---|")
    for isa in ("amx", "avx512_bf16", "avx512_vnni", "avx2_vnni", "avx2"):
        for past, new in PREFILL:
            shape = (isa, "int4", 16, 512, 64, past, new, threads)
            absorbed = measure("prefill", *shape, "absorbed")
            expanded = measure("prefill", *shape, "expanded")
            if absorbed and expanded:
                print(
                    f"| {isa} | {past} | {new} | {absorbed['ms']:.1f} | {expanded['ms']:.1f} "
                    f"| {expanded['append_us'] / 1e3:.2f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round instead of three")
    quick = parser.parse_args().quick
    build()
    for threads in (1, 2):
        decode_table(threads, quick)
    prefill_table(1)


if __name__ == "__main__":
    main()
