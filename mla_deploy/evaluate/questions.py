"""Questions with a number for an answer, in the form of GSM8K (Cobbe et al., 2021).

A file of JSON lines with `question` and `answer`, whose last number, behind `####` where there is
one, is what counts. The model continues a prompt of worked examples and the question, greedily; the
last number in its answer is compared. This is the usual "strict enough" match: the examples show
the form `#### 18`, and what the model writes there has the precedence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.scorer import TextGenerator
from mla_deploy.evaluate.text import json_lines
from mla_deploy.progress import Progress

STOP = "\nQuestion:"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A question and its worked answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class QuestionScore:
    """How many questions were answered rightly."""

    questions: int
    accuracy: float
    answered: float
    """Share of continuations that held a number at all."""
    examples: int


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        UsageError: not there, not JSON lines, or an entry without question and answer.
    """
    found = []
    for number, entry in json_lines(path):
        if not (isinstance(entry, dict) and {"question", "answer"} <= entry.keys()):
            raise UsageError(
                f"{path}, line {number}, is no question",
                found=str(entry)[:80],
                allowed="JSON objects with `question` and `answer`",
            )
        found.append(Question(str(entry["question"]), str(entry["answer"])))
    if not found:
        raise UsageError(
            f"{path} holds no questions", allowed="a line of JSON for each, as GSM8K has them"
        )
    return found


def last_number(text: str) -> float | None:
    """The number behind the last `####`, or else the last number of the text."""
    behind = text.rsplit("####", 1)
    for part in reversed(behind):
        numbers = _NUMBER.findall(part)
        if numbers:
            return float((numbers[0] if len(behind) > 1 else numbers[-1]).replace(",", ""))
    return None


def score_questions(
    model: TextGenerator,
    questions: Sequence[Question],
    examples: Sequence[Question],
    *,
    max_tokens: int,
    journal: Journal,
    progress: Progress | None = None,
) -> QuestionScore:
    """Ask every question.

    Args:
        examples: worked ones that stand before each question.

    Raises:
        UsageError: the examples and a question are too long for the model's context.
    """
    shown = "".join(f"Question: {one.question}\nAnswer: {one.answer}\n\n" for one in examples)
    right = answered = 0
    for number, one in enumerate(questions):
        ids = model.tokenizer.encode(f"{shown}Question: {one.question}\nAnswer:")
        if len(ids) + max_tokens > model.context:
            raise UsageError(
                "the examples and a question are too long for the model's context",
                found=f"{len(ids)} tokens, and {max_tokens} for the answer",
                allowed=f"{model.context} together",
                hint="give fewer --shots",
            )

        def ask(ids: Sequence[int] = ids) -> dict[str, Any]:
            return {"text": model.generate(ids, max_tokens, [STOP])}

        given = last_number(journal.item(f"question {number}", ask)["text"])
        answered += given is not None
        right += given is not None and given == last_number(one.answer)
        if progress is not None:
            progress(number + 1, len(questions), "questions")
    return QuestionScore(
        len(questions), right / len(questions), answered / len(questions), len(examples)
    )
