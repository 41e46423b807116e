"""Prefill and decode speed of the shipped model, quantised and not, in one run.

    make bench                                   (or: python benchmarks/run.py)
    python benchmarks/run.py BUNDLE [BUNDLE...]  other bundles, compared with the first

Each bundle is measured by `mla-deploy bench` in a process of its own, so that its peak memory is
its own too. The table has the median of the repetitions and their range, the bytes of cache that
the bound arrays have per token, and the ratio of each decode speed to the first bundle's at that
depth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "tiny-mla"
RECIPES = {
    "fp32": ("--kv", "fp32", "--weights", "none"),
    "int4-cache": ("--kv", "int4", "--weights", "none"),
    "int4": ("--kv", "int4", "--weights", "int4"),
}
HEAD = ("bundle", "depth", "prefill tok/s", "decode tok/s", "ratio", "cache B/token", "peak MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--depth", default="0,512,2048")
    parser.add_argument("-r", "--repetitions", default="5")
    parser.add_argument("--threads", default=None)
    chosen = parser.parse_args()
    options = ["--depth", chosen.depth, "-r", chosen.repetitions]
    options += [] if chosen.threads is None else ["--threads", chosen.threads]
    bundles = chosen.bundles or [make_bundle(name) for name in RECIPES]

    rows = []
    base: dict[int, float] = {}
    for bundle in bundles:
        measured = command("bench", bundle, *options)
        for one in measured["results"]:
            first = base.setdefault(one["depth"], one["decode_tokens_per_s"])
            rows.append(row(f"{bundle.name}, {measured['kernels']} kernels", one, first))
    print_table(rows)


def make_bundle(name: str) -> Path:
    """The bundle of tiny-mla by one of `RECIPES`, in build/bench."""
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = folder / f"{name}-checkpoint", folder / name
    command("quantize", MODEL, "-o", checkpoint, *RECIPES[name], "--force")
    command("export", checkpoint, "-o", bundle, "--force")
    return bundle


def command(*arguments: object) -> dict[str, Any]:
    """What `mla-deploy` prints with --json."""
    program = [sys.executable, "-c", "from mla_deploy.cli import main; main()"]
    done = subprocess.run(
        [*program, *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)  # the command has said why
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def row(name: str, one: dict[str, Any], first: float) -> tuple[str, ...]:
    decode = one["decode_tokens_per_s"]
    return (
        name,
        f"{one['depth']:,}",
        with_range(one["prefill_tokens_per_s"], one["prefill_tokens_per_s_range"]),
        with_range(decode, one["decode_tokens_per_s_range"]),
        f"{decode / first:.2f}",
        f"{one['kv_bytes_per_token']:g}",
        f"{one['peak_rss_bytes'] / 1e6:.0f}",
    )


def with_range(median: float, ends: list[float]) -> str:
    return f"{median:.0f} ({ends[0]:.0f}-{ends[1]:.0f})"


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Markdown, so that it can be pasted."""
    widths = [max(len(line[column]) for line in [HEAD, *rows]) for column in range(len(HEAD))]
    for line in [HEAD, tuple("-" * width for width in widths), *rows]:
        print(
            "| "
            + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            + " |"
        )


if __name__ == "__main__":
    main()
