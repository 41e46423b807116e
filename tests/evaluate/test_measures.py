"""What can be measured, and which options it takes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.measures import MEASURES, EvalOptions, Result, measures_of


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """What asks for each measure."""
    text, questions, trials = (tmp_path / name for name in ("a.txt", "q.jsonl", "t.jsonl"))
    text.write_text("some text")
    questions.write_text(json.dumps({"question": "One?", "answer": "#### 1"}) + "\n")
    trials.write_text(json.dumps({"input": "The key is 5.", "target": "5"}) + "\n")
    return {
        "text": text,
        "passkey": (64,),
        "key_value": (64,),
        "retrieval": trials,
        "questions": questions,
        "tasks": "arc_easy",
        "examples": questions,
    }


def test_every_option_asks_for_a_measure_or_changes_one() -> None:
    heeded = set().union(*(measure.heeds for measure in MEASURES.values()))
    assert {field.name for field in fields(EvalOptions)} == heeded | set(MEASURES)


def test_measures_are_made_in_one_order(files: dict[str, Any]) -> None:
    assert list(measures_of(EvalOptions(**dict(reversed(files.items()))))) == list(MEASURES)


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("questions", {"reference": Path("model")}, "--reference with --questions"),
        ("tasks", {"reference": Path("model")}, "--reference with --tasks"),
        ("passkey", {"window": 64}, "--window with --passkey"),
        ("questions", {"score_from": 1}, "--score-from with --questions"),
        ("passkey", {"limit": 3}, "--limit with --passkey"),
        ("key_value", {"limit": 3}, "--limit with --key-value"),
        ("text", {"trials": 3}, "--trials with --text"),
        ("text", {"shots": 3}, "--shots with --text"),
        ("questions", {"offline": True}, "--offline with --questions"),
        ("questions", {"shots": 3}, "--shots 3 without --examples"),
        ("questions", {"shots": 3, "examples": ...}, "--shots 3, and 1 in"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    asked: str, options: dict[str, Any], message: str, files: dict[str, Any]
) -> None:
    given = {name: files[name] if value is ... else value for name, value in options.items()}
    with pytest.raises(UsageError) as error:
        measures_of(EvalOptions(**{asked: files[asked]}, **given))
    assert message in str(error.value.found)
    assert error.value.hint


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        (("questions", "text"), {"reference": Path("model")}),
        (("passkey", "retrieval"), {"limit": 3}),
        (("questions", "tasks"), {"shots": 3}),
        (("questions",), {"shots": 0}),
    ],
)
def test_an_option_that_changes_one_of_the_measures_is_taken(
    asked: tuple[str, ...], options: dict[str, Any], files: dict[str, Any]
) -> None:
    assert measures_of(EvalOptions(**{name: files[name] for name in asked}, **options))


def test_lists_of_several_measures_are_joined() -> None:
    values: dict[str, Any] = {"model": "a"}
    for name in ("passkey", "key-value"):
        Result([], {"retrieval": [name]}).add_to(values)
    assert values == {"model": "a", "retrieval": ["passkey", "key-value"]}
