"""What `eval` can be asked for, each a `Measure`: what it reads, what it heeds, what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.harness import run_tasks
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.questions import QuestionScore, read_questions, score_questions
from mla_deploy.evaluate.retrieval import (
    Kind,
    RetrievalScore,
    read_trials,
    score_file,
    score_synthetic,
)
from mla_deploy.evaluate.scorer import TextGenerator
from mla_deploy.evaluate.scores import Evaluation, evaluate
from mla_deploy.evaluate.text import read_text
from mla_deploy.progress import Progress

DEFAULT_TRIALS = 10
DEFAULT_SHOTS = 5
DEFAULT_ANSWER_TOKENS = 256

TaskScores = dict[str, dict[str, float | str]]
Found = Evaluation | QuestionScore | Sequence[RetrievalScore] | TaskScores


@dataclass(frozen=True)
class EvalOptions:
    """What to measure and how; None: not this, or the default."""

    reference: Path | None = None
    """Checkpoint or bundle to compare with."""
    text: Path | None = None
    window: int | None = None
    stride: int | None = None
    score_from: int | None = None
    max_tokens: int | None = None
    passkey: tuple[int, ...] | None = None
    """Lengths in tokens; so `key_value`."""
    key_value: tuple[int, ...] | None = None
    trials: int | None = None
    retrieval: Path | None = None
    questions: Path | None = None
    examples: Path | None = None
    shots: int | None = None
    answer_tokens: int | None = None
    tasks: str | None = None
    """Names, with commas between them."""
    task_path: Path | None = None
    offline: bool = False
    limit: int | None = None

    @property
    def files(self) -> list[Path]:
        """What is read beside the models."""
        files = [self.text, self.retrieval, self.questions, self.examples]
        tasks = [] if self.task_path is None else sorted(self.task_path.rglob("*"))
        return [file for file in files if file is not None] + tasks


@dataclass(frozen=True)
class Models:
    """What is measured."""

    model: TextGenerator
    reference: TextGenerator | None


@dataclass(frozen=True)
class Result:
    """Figures of a measure.

    Attributes:
        values: for `--json`; lists under the same name are joined.
    """

    found: Found
    values: Mapping[str, Any]

    def add_to(self, values: dict[str, Any]) -> None:
        """Put the figures beside those of other measures."""
        for name, value in self.values.items():
            values[name] = [*values.get(name, []), *value] if isinstance(value, list) else value


class Measure(Protocol):
    """Reads its files when it is made: what is wrong with them is said before a model is loaded.

    Raises:
        UsageError: by `__init__` and `run`: files or options that are of no use.
    """

    heeds: ClassVar[frozenset[str]]
    """The options, beside the one that asks for it, that change its figures."""

    def __init__(self, options: EvalOptions) -> None: ...

    def run(self, models: Models, journal: Journal, progress: Progress) -> Result:
        """Measure, without what the journal knows."""


class TextMeasure:
    """Perplexity of a text, and the divergence from a reference."""

    heeds: ClassVar[frozenset[str]] = frozenset(
        {"reference", "window", "stride", "score_from", "max_tokens"}
    )

    def __init__(self, options: EvalOptions) -> None:
        assert options.text is not None
        self._options = options
        self._text = read_text(options.text)

    def run(self, models: Models, journal: Journal, progress: Progress) -> Result:
        options = self._options
        found = evaluate(
            models.model,
            self._text,
            reference=models.reference,
            window=options.window,
            stride=options.stride,
            max_tokens=options.max_tokens,
            score_from=options.score_from or 1,
            journal=journal,
            progress=progress,
        )
        figures = asdict(found)
        figures.update(figures.pop("comparison") or {})
        return Result(found, {"text": str(options.text), **figures})


class _SyntheticMeasure:
    """Facts in prompts of given lengths."""

    heeds: ClassVar[frozenset[str]] = frozenset({"reference", "trials"})
    kind: ClassVar[Kind]

    def __init__(self, options: EvalOptions) -> None:
        self._lengths: Sequence[int] = getattr(options, self.kind.replace("-", "_"))
        self._trials = options.trials or DEFAULT_TRIALS

    def run(self, models: Models, journal: Journal, progress: Progress) -> Result:
        return _retrieval(
            score_synthetic(
                models.model,
                models.reference,
                [self.kind],
                self._lengths,
                trials=self._trials,
                journal=journal,
                progress=progress,
            )
        )


class PasskeyMeasure(_SyntheticMeasure):
    """A number in repeated text."""

    kind: ClassVar[Kind] = "passkey"


class KeyValueMeasure(_SyntheticMeasure):
    """One of many values by its key."""

    kind: ClassVar[Kind] = "key-value"


class RetrievalMeasure:
    """The trials of a file."""

    heeds: ClassVar[frozenset[str]] = frozenset({"reference", "limit"})

    def __init__(self, options: EvalOptions) -> None:
        assert options.retrieval is not None
        self._path, self._limit = options.retrieval, options.limit
        read_trials(self._path)

    def run(self, models: Models, journal: Journal, progress: Progress) -> Result:
        return _retrieval(
            score_file(
                models.model,
                models.reference,
                self._path,
                limit=self._limit,
                journal=journal,
                progress=progress,
            )
        )


class QuestionsMeasure:
    """Questions with a number for an answer."""

    heeds: ClassVar[frozenset[str]] = frozenset({"examples", "shots", "answer_tokens", "limit"})

    def __init__(self, options: EvalOptions) -> None:
        assert options.questions is not None
        self._questions = read_questions(options.questions)[: options.limit]
        examples = [] if options.examples is None else read_questions(options.examples)
        if options.examples is not None and (options.shots or 0) > len(examples):
            raise UsageError(
                "there are fewer examples than are to be shown",
                found=f"--shots {options.shots}, and {len(examples)} in {options.examples}",
                hint="give fewer --shots, or more examples",
            )
        self._examples = examples[: DEFAULT_SHOTS if options.shots is None else options.shots]
        self._answer_tokens = options.answer_tokens or DEFAULT_ANSWER_TOKENS

    def run(self, models: Models, journal: Journal, progress: Progress) -> Result:
        found = score_questions(
            models.model,
            self._questions,
            self._examples,
            max_tokens=self._answer_tokens,
            journal=journal,
            progress=progress,
        )
        return Result(found, {"questions": asdict(found)})


class TasksMeasure:
    """Tasks of lm-evaluation-harness."""

    heeds: ClassVar[frozenset[str]] = frozenset({"task_path", "shots", "offline", "limit"})

    def __init__(self, options: EvalOptions) -> None:
        assert options.tasks is not None
        self._names = [name.strip() for name in options.tasks.split(",")]
        self._options = options

    def run(self, models: Models, journal: Journal, progress: Progress) -> Result:
        options = self._options
        found = run_tasks(
            models.model,
            self._names,
            task_path=options.task_path,
            shots=options.shots,
            limit=options.limit,
            offline=options.offline,
            journal=journal,
            progress=progress,
        )
        return Result(found, {"tasks": found})


MEASURES: dict[str, type[Measure]] = {
    "text": TextMeasure,
    "passkey": PasskeyMeasure,
    "key_value": KeyValueMeasure,
    "retrieval": RetrievalMeasure,
    "questions": QuestionsMeasure,
    "tasks": TasksMeasure,
}
"""By the option that asks for each."""


def measures_of(options: EvalOptions) -> dict[str, Measure]:
    """The measures that are asked for, by their options.

    Raises:
        UsageError: none is, an option would change nothing, or a file is of no use.
    """
    chosen = [name for name in MEASURES if getattr(options, name) is not None]
    if not chosen:
        raise UsageError(
            "nothing was asked for",
            allowed=_flags(MEASURES),
            hint="give one or more of them, for instance --text FILE",
        )
    for field in fields(options):
        heeded_by = [name for name, measure in MEASURES.items() if field.name in measure.heeds]
        is_given = getattr(options, field.name) not in (None, False)
        if is_given and heeded_by and not set(heeded_by) & set(chosen):
            raise UsageError(
                f"{_flags([field.name])} would change nothing",
                found=f"{_flags([field.name])} with {_flags(chosen)}",
                allowed=f"with {_flags(heeded_by)}",
                hint=f"leave it out, or ask for {_flags(heeded_by[:1])} as well",
            )
    if options.shots and options.examples is None and "tasks" not in chosen:
        raise UsageError(
            "examples to show come from a file",
            found=f"--shots {options.shots} without --examples",
            hint="give --examples FILE, or leave --shots out",
        )
    return {name: MEASURES[name](options) for name in chosen}


def _flags(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _retrieval(found: Sequence[RetrievalScore]) -> Result:
    return Result(found, {"retrieval": [asdict(score) for score in found]})
