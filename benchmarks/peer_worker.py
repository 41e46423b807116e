"""One engine in a process of its own, told by lines of JSON what to do.

`decode_depth.py` keeps one such process for each engine and lets them take turns, so that all are
measured at the same time of the same machine and each one's memory is its own. Requests are
`{"do": NAME, ...}`, answers the values of that name; the first answer comes when the engine is
loaded. This file needs nothing but Python, because peers live in environments of their own.
"""

from __future__ import annotations

import json
import random
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

PREFIX_TOKENS = 512  # real tokens at the start of a depth; the rest are copies of their cache


class Engine(ABC):
    """What an engine must do to be measured."""

    vocab_size: int
    bytes_per_token: float
    """Of cache, in all layers."""

    @abstractmethod
    def append(self, tokens: list[int]) -> list[float]:
        """Append tokens to the sequence; the logits after the last, [vocab_size]."""

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    @abstractmethod
    def fill(self, length: int) -> None:
        """Grow to `length` tokens by copies of the cache of those that are there."""


class Worker:
    """Answers requests with an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._depth = 0
        draw = random.Random(0)
        self._prefix = [draw.randrange(engine.vocab_size) for _ in range(PREFIX_TOKENS)]

    def depth(self, tokens: int) -> dict[str, Any]:
        """Bring the sequence to a depth."""
        self._engine.rewind(0)
        if tokens:
            self._engine.append(self._prefix[:tokens])
            self._engine.fill(tokens)
        self._depth = tokens
        return {}

    def decode(self, tokens: int) -> dict[str, Any]:
        """Time greedy steps behind the depth."""
        token = self._prefix[0]
        start = time.perf_counter()
        for _ in range(tokens):
            logits = self._engine.append([token])
            token = max(range(0, len(logits), 997), key=logits.__getitem__)  # cheap, and varied
        seconds = time.perf_counter() - start
        self._engine.rewind(self._depth)
        return {"seconds": seconds}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Time a prompt behind the depth."""
        start = time.perf_counter()
        self._engine.append(self._prefix[:tokens])
        seconds = time.perf_counter() - start
        self._engine.rewind(self._depth)
        return {"seconds": seconds}

    def logits(self, tokens: int) -> dict[str, Any]:
        """The logits after a prompt, to see that engines compute the same."""
        self._engine.rewind(0)
        logits = list(self._engine.append(self._prefix[:tokens]))
        self._engine.rewind(0)
        return {"logits": [float(x) for x in logits]}


def resident_bytes(name: str = "VmHWM") -> int:
    """The process's peak (VmHWM) or present (VmRSS) resident memory."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def serve(make: Any) -> None:
    """Load the engine that `make` gives, then answer until standard input ends."""
    start = time.perf_counter()
    engine: Engine = make()
    worker = Worker(engine)
    facts = {
        "load_seconds": time.perf_counter() - start,
        "load_rss_bytes": resident_bytes(),
        "bytes_per_token": engine.bytes_per_token,
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps({**answer, "peak_rss_bytes": resident_bytes()}), flush=True)
