"""Decode and prefill by depth of context, against llama.cpp on the same weights in one run.

    python benchmarks/decode_depth.py [--depth 0,8192,32768] [-r 5] [--llama-python PYTHON]
    python benchmarks/decode_depth.py --config CONFIG.json --work FOLDER [--llama f16,q4_0] ...

The model is the synthetic one of 0.71 B parameters (`make_synthetic.py`), made once in build/bench,
or, with random weights, one of a config.json, made once in --work. Ours has int4 weights, the
output matrix included, and int4 in every layer's cache; llama.cpp's is a Q4_0 GGUF of the same
checkpoint. Every engine is a process of its own; they take turns, one repetition each, so that a
change of the machine's speed meets them all. Given are medians and ranges, the ratio of our median
to that of llama.cpp's fastest variant, bytes of cache a token, and peak resident memory.

llama.cpp is no dependency: `pip install -e '.[peers]'` builds llama-cpp-python from its source
(about ten minutes), here or in another environment that --llama-python names. Behind a depth lies a
real prefix of 512 tokens and copies of its cache, in both engines.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "bench" / "synthetic"
PREFILL_TOKENS = 512
SLACK = 512 + 64  # tokens behind the deepest depth
QUANTIZE = ("--kv", "int4", "--kv-first", "int4", "--weights", "int4", "--lm-head", "int4")


@dataclass
class Contender:
    """An engine in a process of its own."""

    name: str
    command: list[str]
    process: subprocess.Popen[str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        answer = self._answer()
        self.facts["peak_rss_bytes"] = answer.pop("peak_rss_bytes")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} stopped with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()


def run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True)


def make_models(work: Path, config: Path | None) -> tuple[Path, Path]:
    """The bundle and the GGUF of the synthetic checkpoint; kept for the next run."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, small, bundle, gguf = (
        work / name for name in ("hf", "int4", "bundle", "q4_0.gguf")
    )
    cli = ("-c", "from mla_deploy.cli import main; main()")
    if not checkpoint.exists() and not (bundle.exists() and gguf.exists()):
        run(HERE / "make_synthetic.py", checkpoint, *(["--config", config] if config else []))
    if not bundle.exists():
        run(*cli, "quantize", checkpoint, "-o", small, *QUANTIZE)
        run(*cli, "export", small, "-o", bundle)
    if not gguf.exists():
        part = gguf.with_suffix(".part")
        run(HERE / "synthetic_gguf.py", checkpoint, part)
        part.rename(gguf)
    return bundle, gguf


def measure(
    contenders: list[Contender], what: str, depth: int, tokens: int, repetitions: int
) -> dict[str, list[float]]:
    """Tokens a second of each contender; they take turns."""
    for one in contenders:
        one.ask("depth", tokens=depth)
        one.ask(what, tokens=tokens)  # warm up
    speeds: dict[str, list[float]] = {one.name: [] for one in contenders}
    for _ in range(repetitions):
        for one in contenders:
            speeds[one.name].append(tokens / one.ask(what, tokens=tokens)["seconds"])
    return speeds


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        math.fsum(x * x for x in a) * math.fsum(y * y for y in b)
    )


def report(what: str, depth: int, speeds: dict[str, list[float]], all_: list[Contender]) -> None:
    ours, *peers = (statistics.median(values) for values in speeds.values())
    facts = {one.name: one.facts for one in all_}
    for name, values in speeds.items():
        ratio = f"**{ours / max(peers):.2f}x**" if name == all_[0].name else ""
        print(
            f"| {what} | {depth:,} | {name} | {statistics.median(values):.1f} "
            f"({min(values):.1f}-{max(values):.1f}) | {ratio} "
            f"| {facts[name]['bytes_per_token']:,.0f} "
            f"| {facts[name]['peak_rss_bytes'] / 1e6:,.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--depth", default="0,8192,32768", help="of decoding")
    parser.add_argument("--prefill-depth", default="0,8192")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-n", "--tokens", type=int, default=8, help="decode steps a repetition")
    parser.add_argument("--work", type=Path, default=WORK, help="where the models are kept")
    parser.add_argument("--config", type=Path, help="of another model; with a --work of its own")
    parser.add_argument(
        "--llama", default="f16,q4_0,plain", help="its caches; plain: f16 without flash attention"
    )
    parser.add_argument("--llama-python", default=sys.executable)
    args = parser.parse_args()
    if args.config and args.work == WORK:
        parser.error("--config needs a --work of its own")
    variants = args.llama.split(",")
    if not set(variants) <= {"f16", "q4_0", "plain"} or "f16" not in variants:
        parser.error("--llama takes f16, and q4_0 and plain beside it")
    decode_depths = [int(one) for one in args.depth.split(",") if one]
    prefill_depths = [int(one) for one in args.prefill_depth.split(",") if one]
    bundle, gguf = make_models(args.work, args.config)
    size = str(max([*decode_depths, *prefill_depths]) + SLACK)

    def llama(name: str, cache: str, flash: int) -> Contender:
        script = str(HERE / "peer_llama_cpp.py")
        command = [args.llama_python, script, str(gguf), str(args.threads), size, cache, str(flash)]
        return Contender(f"llama.cpp {name}", command)

    ours = Contender(
        "mla-deploy int4",
        [sys.executable, str(HERE / "peer_ours.py"), str(bundle), str(args.threads), size],
    )
    peers = {
        "f16": llama("f16, flash", "f16", 1),
        "q4_0": llama("q4_0, flash", "q4_0", 1),
        "plain": llama("f16, no flash", "f16", 0),
    }
    everyone = [ours, *(peers[name] for name in variants)]
    try:
        for one in everyone:
            one.start()
            print(
                f"{one.name}: loaded in {one.facts['load_seconds']:.1f} s, "
                f"{one.facts['load_rss_bytes'] / 1e6:,.0f} MB resident"
            )
        logits = [one.ask("logits", tokens=64)["logits"] for one in everyone]
        print("cosine of the logits with ours: " + ", ".join(
            f"{one.name} {cosine(logits[0], other):.4f}"
            for one, other in zip(everyone[1:], logits[1:], strict=True)
        ))  # fmt: skip
        print("\n| | depth | engine | tokens/s | against the fastest llama.cpp | cache B/token "
              "| peak MB |\n|---|---:|---|---:|---:|---:|---:|")  # fmt: skip
        for depth in decode_depths:
            chosen = [ours, *(peers[name] for name in variants if name != "plain")]
            speeds = measure(chosen, "decode", depth, args.tokens, args.repetitions)
            report("decode", depth, speeds, chosen)
        for depth in prefill_depths:
            chosen = [ours, *(peers[name] for name in variants if name != "q4_0")]
            speeds = measure(chosen, "prefill", depth, PREFILL_TOKENS, args.repetitions)
            report(f"prefill {PREFILL_TOKENS}", depth, speeds, chosen)
    finally:
        for one in everyone:
            one.stop()


if __name__ == "__main__":
    main()
