"""What the engine takes by itself: loading a bundle, and a token through either of its faces.

    python benchmarks/engine.py BUNDLE [--library libmla_deploy.so] [-n 200] [-r 5]

- Loading, in a process of its own: seconds, and the memory that stays and that it took at most,
  against the size of the weights. A ratio near 1 means that nothing is in memory twice.
- Decoding by Python, `Session.decode` and `Engine.stream`, and with --library by the C ABI's
  `mla_generate`, where no Python runs between two tokens: microseconds a token, in turn, medians.
  Processor time, with one thread, as this says what a face costs on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mla_deploy.bundle import Bundle
from mla_deploy.runtime import GenerationOptions, load

LOAD = """
import json, sys, time
from mla_deploy.runtime import load
def kilobytes(name):
    status = open("/proc/self/status").read()
    return int(status.split(name + ":")[1].split()[0])
before = kilobytes("VmRSS")
start = time.perf_counter()
engine = load(sys.argv[1], max_tokens=1024)
seconds = time.perf_counter() - start
engine.session().prefill([1, 2, 3])
print(json.dumps([seconds, kilobytes("VmRSS") - before, kilobytes("VmHWM") - before]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--library", type=Path, help="libmla_deploy.so, to compare with")
    parser.add_argument("-n", "--tokens", type=int, default=200)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    args = parser.parse_args()
    measure_loading(args.bundle)
    measure_decoding(args.bundle, args.library, args.tokens, args.repetitions)


def measure_loading(bundle: Path) -> None:
    command = [sys.executable, "-c", LOAD, str(bundle)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, stays, peak = json.loads(output)
    manifest = Bundle.open(bundle).manifest
    weights = sum(file.bytes for file in manifest.files if file.path.startswith("model.onnx"))
    print(f"graph and weights {weights / 1e6:10.1f} MB")
    print(f"load              {seconds:10.2f} s")
    for name, kilobytes in (("stays", stays), ("peak", peak)):
        size = kilobytes * 1024
        print(f"memory that {name:5} {size / 1e6:10.1f} MB  {size / weights:.2f} of the weights")


def measure_decoding(bundle: Path, library: Path | None, count: int, repetitions: int) -> None:
    engine = load(bundle, threads=1, spin=False, max_tokens=2 * count + 64)
    vocab_size = engine.bundle.manifest.model.vocab_size
    prompt = [5, 6, 7]

    def by_decode() -> int:
        with engine.session() as session:
            logits = session.prefill(prompt)
            for _ in range(count - 1):
                logits = session.decode(int(logits.argmax()))
        return count

    def by_stream() -> int:  # perhaps to an earlier end
        return sum(1 for _ in engine.stream(prompt, GenerationOptions(max_tokens=count)))

    ways: dict[str, Callable[[], int]] = {"Session.decode": by_decode, "Engine.stream": by_stream}
    if library is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        from cpp.core_abi import Api

        c_engine = Api(library).engine(
            bundle, spin=0, max_tokens=2 * count + 64, ops_library=engine.kernels.library
        )

        def by_c() -> int:
            session = c_engine.session()
            made = session.generate(prompt, max_tokens=count)
            session.destroy()
            return len(made.tokens)

        ways["mla_generate"] = by_c
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            start = time.process_time()
            made = way()
            if repetition:  # the first one warms up
                taken[name].append((time.process_time() - start) / made * 1e6)
    print(f"decode, {engine.kernels.name} kernels, vocabulary {vocab_size}:")
    least = statistics.median(taken["mla_generate"]) if library is not None else None
    for name, values in taken.items():
        median = statistics.median(values)
        extra = "" if least is None else f"  {median - least:+8.1f} us over mla_generate"
        print(
            f"  {name:15} {median:9.1f} us a token ({min(values):.1f} to {max(values):.1f}){extra}"
        )


if __name__ == "__main__":
    main()
