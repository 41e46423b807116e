"""Whether a model finds a fact in a long context: passkeys, and values by their key.

A trial is a prompt and its answer. The answer's tokens are scored behind the prompt in one pass:
the trial is passed if each of them is the most likely one, that is if greedy decoding gives exactly
the answer. Their mean surprise in nats is reported too, because it moves long before the share of
passed trials does.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.scorer import Scorer
from mla_deploy.evaluate.text import json_lines
from mla_deploy.progress import Progress
from mla_deploy.tokenizer import Tokenizer

Kind = Literal["passkey", "key-value"]
KINDS: tuple[Kind, ...] = ("passkey", "key-value")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the fact is: 0 at the start of the context, 1 at its end."""
FILLER = (
    "The river runs slowly past the mill. ",
    "Clouds gather over the hills, and drift away again. ",
    "A cart goes by on the road to the market. ",
    "In the evening the lamps are lit one after another. ",
)
WORDS = (
    "amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron",
    "ivory", "jade", "kelp", "lotus", "maple", "noble", "olive", "pearl",
    "quartz", "raven", "slate", "topaz", "umber", "violet", "willow", "zinc",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A prompt and what should follow."""

    prompt: str
    answer: str
    depth: float | None = None
    """Share of the context before the fact; None: not known."""


@dataclass(frozen=True)
class RetrievalScore:
    """The trials of one length and depth."""

    task: str
    length: int
    """Tokens of the prompt; of trials from a file, of the longest."""
    depth: float | None
    trials: int
    accuracy: float
    answer_nats: float
    """Mean surprise of the answers' tokens."""
    reference_accuracy: float | None
    reference_answer_nats: float | None


def make_trial(
    tokenizer: Tokenizer, kind: Kind, length: int, depth: float, draw: random.Random
) -> Trial:
    """A synthetic trial of about `length` tokens, never more.

    Raises:
        UsageError: a length too short to hold the fact and the question.
    """
    make = {"passkey": _passkey, "key-value": _key_value}[kind]
    low, high = 1, length  # pieces of filler: each is a token or more
    best: Trial | None = None
    state = draw.getstate()
    while low <= high:
        middle = (low + high) // 2
        draw.setstate(state)
        trial = make(middle, depth, draw)
        if len(tokenizer.encode(trial.prompt + trial.answer)) <= length:
            best, low = trial, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise UsageError(
            f"a {kind} trial does not fit into so few tokens",
            found=f"{length} tokens",
            hint="give a greater length",
        )
    return best


def _passkey(pieces: int, depth: float, draw: random.Random) -> Trial:
    key = draw.randint(10000, 99999)
    fact = f"The pass key is {key}. Remember it: {key} is the pass key. "
    filler = [FILLER[at % len(FILLER)] for at in range(pieces)]
    place = round(depth * pieces)
    body = "".join([*filler[:place], fact, *filler[place:]])
    return Trial(f"{body}What is the pass key? The pass key is", f" {key}", depth)


def _key_value(pieces: int, depth: float, draw: random.Random) -> Trial:
    names = WORDS if pieces <= len(WORDS) else [f"{a}-{b}" for a in WORDS for b in WORDS if a != b]
    if pieces > len(names):
        names = [f"{name}-{number}" for number in range(-(-pieces // len(names))) for name in names]
    keys = draw.sample(names, pieces)
    values = {key: draw.randint(10, 99) for key in keys}
    asked = keys[round(depth * (pieces - 1))]
    listed = " ".join(f"{key} is {value};" for key, value in values.items())
    return Trial(f"Codes: {listed} {asked} is", f" {values[asked]}", depth)


def read_trials(path: Path) -> list[Trial]:
    """Trials of a file: JSON lines, gzipped if its name ends so.

    Either `input` and `target` (passkey files), or `ordered_kv_records`, `key` and `value` (the
    key-value retrieval of Liu et al., 2023, "Lost in the middle").

    Raises:
        UsageError: not there, too large, or of another form.
    """
    trials = [_trial_of(entry, path, number) for number, entry in json_lines(path)]
    if not trials:
        raise UsageError(f"{path} holds no trials", hint="give a file of JSON lines")
    return trials


def _trial_of(entry: Any, path: Path, number: int) -> Trial:
    try:
        if "ordered_kv_records" in entry:
            records = [(str(key), str(value)) for key, value in entry["ordered_kv_records"]]
            listed = ",\n ".join(f'"{key}": "{value}"' for key, value in records)
            key, value = str(entry["key"]), str(entry["value"])
            place = [name for name, _ in records].index(key)
            prompt = (
                "Extract the value of the key below from this JSON object.\n\n"
                f'{{{listed}}}\n\nKey: "{key}"\nValue: "'
            )
            return Trial(prompt, value, place / max(1, len(records) - 1))
        prompt, target = str(entry["input"]), str(entry["target"])
        at = entry.get("passkey_position")
        return Trial(
            f"{prompt.rstrip()}\nWhat is the pass key? The pass key is",
            f" {target}",
            None if at is None else round(prompt.find(target) / max(1, len(prompt)), 2),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(
            f"{path}, line {number}, is no trial",
            found=str(entry)[:80],
            allowed="`input` and `target`, or `ordered_kv_records`, `key` and `value`",
        ) from None


def score_synthetic(
    model: Scorer,
    reference: Scorer | None,
    kinds: Sequence[Kind],
    lengths: Sequence[int],
    *,
    trials: int,
    journal: Journal,
    progress: Progress | None = None,
) -> list[RetrievalScore]:
    """Synthetic trials of each kind, length and depth; the same for every model.

    Raises:
        UsageError: a length beyond a model's context.
    """
    found = []
    total = len(kinds) * len(lengths) * len(DEPTHS)
    for kind in kinds:
        for length in lengths:
            check_length(model, reference, length)
            for depth in DEPTHS:
                draw = random.Random(f"{kind} {length} {depth}")
                made = [
                    make_trial(model.tokenizer, kind, length, depth, draw) for _ in range(trials)
                ]
                key = f"{kind} {length} {depth}"
                found.append(_score(model, reference, kind, length, depth, made, journal, key))
                if progress is not None:
                    progress(len(found), total, f"{kind}, {length} tokens")
    return found


def score_file(
    model: Scorer,
    reference: Scorer | None,
    path: Path,
    *,
    limit: int | None,
    journal: Journal,
    progress: Progress | None = None,
) -> list[RetrievalScore]:
    """The trials of a file, by depth in quarters; those that no context holds are an error.

    Raises:
        UsageError: as `read_trials`, or a trial longer than a model's context.
    """
    spans: dict[float | None, list[Trial]] = {}
    read = read_trials(path)[:limit]
    for trial in read:
        span = None if trial.depth is None else round(trial.depth * 4) / 4
        spans.setdefault(span, []).append(trial)
    found = []
    for depth, made in sorted(spans.items(), key=lambda entry: entry[0] or 0.0):
        length = max(len(model.tokenizer.encode(one.prompt + one.answer)) for one in made)
        check_length(model, reference, length)
        key = f"{path.name} {depth}"
        found.append(_score(model, reference, path.name, length, depth, made, journal, key))
        if progress is not None:
            progress(len(found), len(spans), path.name)
    return found


def check_length(model: Scorer, reference: Scorer | None, length: int) -> None:
    """Raise a UsageError if a prompt is longer than a model's context."""
    contexts = [model.context] + ([] if reference is None else [reference.context])
    if length > min(contexts):
        raise UsageError(
            "a prompt is longer than the model's context",
            found=f"{length} tokens",
            allowed=f"{min(contexts)}",
            hint="give shorter lengths, or a file of shorter prompts",
        )


def _score(
    model: Scorer,
    reference: Scorer | None,
    task: str,
    length: int,
    depth: float | None,
    trials: Sequence[Trial],
    journal: Journal,
    key: str,
) -> RetrievalScore:
    scorers = [model] if reference is None else [model, reference]
    sums = []
    for which, scorer in enumerate(scorers):
        results = [
            journal.item(f"{key} {number} {which}", functools.partial(answer, scorer, trial))
            for number, trial in enumerate(trials)
        ]
        passed = sum(one["passed"] for one in results) / len(results)
        tokens = sum(one["tokens"] for one in results)
        sums.append((passed, sum(one["nats"] for one in results) / tokens))
    other = sums[1] if reference is not None else (None, None)
    return RetrievalScore(task, length, depth, len(trials), *sums[0], *other)


def answer(model: Scorer, trial: Trial) -> dict[str, Any]:
    """One trial: `passed`, and the summed surprise in `nats` of so many `tokens`."""
    prompt = model.tokenizer.encode(trial.prompt)
    target = model.tokenizer.encode(trial.answer, add_special_tokens=False)
    rows = model.logits([*prompt, *target[:-1]])[len(prompt) - 1 :].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    nats = np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(target)), target]
    return {
        "passed": bool((rows.argmax(-1) == np.array(target)).all()),
        "nats": float(nats.sum()),
        "tokens": len(target),
    }
