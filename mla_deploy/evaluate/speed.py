"""How fast a loaded bundle is at a given depth of context, and what that costs in memory.

A depth is reached by copying the cache pages of a real prefix: the kernels then read as many bytes
from as many places as after a real prefill of that length, and reaching 32k tokens takes a moment.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mla_deploy.errors import UsageError
from mla_deploy.progress import Progress

PREFIX_TOKENS = 512
"""Real tokens at the start of a depth; the rest are copies of their pages."""


class TimedSession(Protocol):
    """A sequence in the cache."""

    def prefill(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens; the logits after the last, [vocab_size]."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def fill_by_copies(self, length: int) -> None:
        """Grow to `length` tokens by copying pages of those that are there."""


@dataclass(frozen=True)
class Rate:
    """Tokens per second over the repetitions."""

    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class SpeedAtDepth:
    """What `measure_speed` found at one depth."""

    depth: int
    prefill: Rate
    decode: Rate
    peak_rss_bytes: int
    """Of the process so far; depths are measured in rising order."""


def measure_speed(
    new_session: Callable[[], TimedSession],
    vocab_size: int,
    context: int,
    depths: Sequence[int],
    *,
    prompt_tokens: int,
    decode_tokens: int,
    repetitions: int,
    progress: Progress | None = None,
) -> list[SpeedAtDepth]:
    """Time a prefill of `prompt_tokens` and `decode_tokens` greedy steps behind each depth.

    Each depth is measured once unseen, to warm up, then `repetitions` times.

    Raises:
        UsageError: a depth for which the context has no room.
    """
    check_depths(depths, context, max(prompt_tokens, decode_tokens))
    draw = random.Random(0)  # which tokens is of no interest, as long as they differ
    prompt = [draw.randrange(vocab_size) for _ in range(prompt_tokens)]
    prefix = [draw.randrange(vocab_size) for _ in range(PREFIX_TOKENS)]
    results: list[SpeedAtDepth] = []
    for depth in sorted(depths):
        session = new_session()
        if depth:
            session.prefill(prefix[:depth])
            session.fill_by_copies(depth)
        prefill, decode = [], []
        for repetition in range(repetitions + 1):
            if progress is not None:
                done = len(results) * (repetitions + 1) + repetition
                progress(done, len(depths) * (repetitions + 1), f"depth {depth}")
            prefill.append(_time_prefill(session, depth, prompt))
            decode.append(_time_decode(session, depth, prompt[0], decode_tokens))
        session.rewind(0)
        results.append(
            SpeedAtDepth(
                depth,
                _rate(prompt_tokens, prefill[1:]),
                _rate(decode_tokens, decode[1:]),
                peak_rss_bytes(),
            )
        )
    return results


def check_depths(depths: Sequence[int], context: int, new_tokens: int) -> None:
    """Raise UsageError if a depth leaves no room for `new_tokens` in the context."""
    if max(depths) + new_tokens > context:
        raise UsageError(
            "a depth leaves no room in the model's context",
            found=f"depth {max(depths)} and {new_tokens} new tokens",
            allowed=f"{context} together",
            hint="give a smaller --depth, or fewer --prompt-tokens",
        )


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its figure starts with the peak of the program that started this one.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _time_prefill(session: TimedSession, depth: int, prompt: Sequence[int]) -> float:
    start = time.perf_counter()
    session.prefill(prompt)
    seconds = time.perf_counter() - start
    session.rewind(depth)
    return seconds


def _time_decode(session: TimedSession, depth: int, token: int, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        token = int(session.prefill([token]).argmax())
    seconds = time.perf_counter() - start
    session.rewind(depth)
    return seconds


def _rate(tokens: int, seconds: Sequence[float]) -> Rate:
    return Rate(
        median=tokens / statistics.median(seconds),
        slowest=tokens / max(seconds),
        fastest=tokens / min(seconds),
    )
