"""Concurrent streams through `mla-deploy serve` against one stream through the engine, in one run.

    python benchmarks/serve.py [BUNDLE] [--streams 1,4,8] [-n 128] [-r 5]

- engine: `Engine.stream`, one sequence, in this process.
- engine, batch: `Engine.step` with so many sequences and the likeliest token of each, in this
  process: what the server would reach if HTTP and scheduling cost nothing.
- server: the command in a process of its own, and in another one a client for each stream, which
  does little more than read.

Times are from the request to the last token of the last stream, prompts of --depth tokens included,
which is the same work for all three. All in turn in each repetition; medians and their range.
Without BUNDLE: tiny-mla in int4. A stream that ends early is an error: it would count as slow.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from run import make_bundle

from mla_deploy.runtime import Engine, GenerationOptions, load

HEAD = ("what", "streams", "tokens/s", "(range)", "against one by the engine", "against the batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--depth", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("-n", "--tokens", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    bundle = chosen.bundle or make_bundle("int4")
    counts = [int(count) for count in chosen.streams.split(",")]
    cache = 2 * max(counts) * (chosen.depth + chosen.tokens + 64)
    engine = load(bundle, max_tokens=cache, threads=chosen.threads)
    found: dict[tuple[str, int], list[float]] = {}

    def note(what: str, streams: int, rate: float) -> None:
        found.setdefault((what, streams), []).append(rate)

    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as clients, Command(bundle, cache, max(counts), chosen.threads) as server:
        for repetition in range(chosen.repetitions + 1):
            rates: list[tuple[str, int, float]] = []
            prompts = [prompt(chosen.depth, repetition * 16 + i) for i in range(max(counts))]
            rates.append(("engine", 1, one_stream(engine, prompts[0], chosen.tokens)))
            for count in counts:
                rate = batch(engine, prompts[:count], chosen.tokens)
                rates.append(("engine, batch", count, rate))
                given = (server.url, server.model, prompts[:count], chosen.tokens)
                rates.append(("server", count, clients.apply(streams, given)))
            for one in rates if repetition else []:  # the first one warms up
                note(*one)
    print(f"{bundle}: {chosen.tokens} tokens after prompts of {chosen.depth}, median of "
          f"{chosen.repetitions}; kernels: {engine.kernels.name}\n")  # fmt: skip
    print_table(found)


def prompt(length: int, seed: int) -> list[int]:
    """Ids that no other prompt begins with."""
    return [5 + (seed * 31 + index * 7) % 200 for index in range(length)]


def one_stream(engine: Engine, ids: list[int], count: int) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    made = len(engine.generate(ids, GenerationOptions(max_tokens=count)).tokens)
    check(made, count)
    return made / (time.perf_counter() - start)


def batch(engine: Engine, prompts: list[list[int]], count: int) -> float:
    """Tokens a second of all sequences together, without text."""
    start = time.perf_counter()
    sessions = [engine.session() for _ in prompts]
    rows = [session.prefill(ids) for session, ids in zip(sessions, prompts, strict=True)]
    for _ in range(count - 1):
        rows = engine.step(
            [(session, [int(row.argmax())]) for session, row in zip(sessions, rows, strict=True)]
        )
    taken = time.perf_counter() - start
    for session in sessions:
        session.close()
    return len(prompts) * count / taken


def streams(url: str, model: str, prompts: list[list[int]], count: int) -> float:
    """Tokens a second that clients of the server get together. Runs in a process of its own."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        made = list(pool.map(lambda ids: read_stream(url, model, ids, count), prompts))
    taken = time.perf_counter() - start
    for one in made:
        check(one, count)
    return sum(made) / taken


def read_stream(url: str, model: str, ids: list[int], count: int) -> int:
    """Read a stream to its end; the tokens that its usage counts."""
    place = urlsplit(url)
    body = json.dumps(
        {"model": model, "prompt": ids, "max_tokens": count, "temperature": 0, "stream": True,
         "stream_options": {"include_usage": True}}
    )  # fmt: skip
    head = (
        f"POST {place.path}/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    end = b""
    with socket.create_connection((str(place.hostname), place.port or 80)) as connection:
        connection.sendall(head.encode() + body.encode())
        while b"data: [DONE]" not in end:
            came = connection.recv(1 << 16)
            if not came:
                raise RuntimeError(f"the server left after {end!r}")
            end = (end + came)[-2000:]
    return int(end.rpartition(b'"completion_tokens":')[2].split(b",")[0])


def check(made: int, wanted: int) -> None:
    """Raise if a stream ended early."""
    if made != wanted:
        raise RuntimeError(f"a stream ended after {made} of {wanted} tokens; choose another seed")


class Command:
    """`mla-deploy serve` in a process."""

    def __init__(self, bundle: Path, cache: int, parallel: int, threads: int | None) -> None:
        command = [sys.executable, "-c", "from mla_deploy.cli import main; main()", "serve"]
        options = ["--port", "0", "--json", "--max-tokens", cache, "--parallel", parallel]
        options += [] if threads is None else ["--threads", threads]
        self._process = subprocess.Popen(
            [*command, str(bundle), *map(str, options)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        lines: list[str] = []
        for line in self._process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        if not lines:
            sys.exit(2)  # the command has said why
        values: dict[str, Any] = json.loads("".join(lines))
        self.url: str = values["url"]
        self.model: str = values["model"]

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def print_table(found: dict[tuple[str, int], list[float]]) -> None:
    """Markdown, so that it can be pasted."""
    medians = {key: statistics.median(rates) for key, rates in found.items()}
    rows = [HEAD, tuple("-" * len(name) for name in HEAD)]
    for (what, count), median in medians.items():
        rates = found[what, count]
        rows.append(
            (
                what,
                str(count),
                f"{median:.1f}",
                f"({min(rates):.1f}-{max(rates):.1f})",
                f"{median / medians['engine', 1]:.2f}x",
                f"{median / medians['engine, batch', count]:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
