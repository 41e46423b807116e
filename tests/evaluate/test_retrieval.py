"""Retrieval and questions, with models whose answers are known."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.questions import (
    Question,
    last_number,
    read_questions,
    score_questions,
)
from mla_deploy.evaluate.retrieval import (
    DEPTHS,
    KINDS,
    Kind,
    answer,
    make_trial,
    read_trials,
    score_file,
    score_synthetic,
)
from mla_deploy.evaluate.scorer import TorchScorer
from mla_deploy.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_mla: Path) -> Tokenizer:
    return Tokenizer.open(tiny_mla)


class Oracle:
    """Expects the token that followed the last occurrence of the last two; finds what is there."""

    name = "oracle"
    context = 4096

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        found = np.zeros((len(ids), self.tokenizer.vocab_size), np.float32)
        for place in range(1, len(ids)):
            for before in range(place - 1, 0, -1):
                if list(ids[before - 1 : before + 1]) == list(ids[place - 1 : place + 1]):
                    found[place, ids[before + 1]] = 20.0
                    break
        return found


class Ignorant(Oracle):
    """Always expects token 5."""

    name = "ignorant"

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        found = np.zeros((len(ids), self.tokenizer.vocab_size), np.float32)
        found[:, 5] = 20.0
        return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [100, 600, 2000])
def test_a_trial_fills_its_length_and_holds_its_answer_at_its_depth(
    tokenizer: Tokenizer, kind: Kind, length: int
) -> None:
    for depth in DEPTHS:
        trial = make_trial(tokenizer, kind, length, depth, random.Random(3))
        used = len(tokenizer.encode(trial.prompt + trial.answer))
        assert length - 30 <= used <= length
        fact = {"passkey": f"key is{trial.answer}.", "key-value": f"is{trial.answer};"}[kind]
        assert fact in trial.prompt
        if kind == "passkey":
            place = trial.prompt.index(fact) / len(trial.prompt)
            assert abs(place - depth) < 0.1 + 120 / length
        again = make_trial(tokenizer, kind, length, depth, random.Random(3))
        assert again == trial


def test_a_length_that_holds_no_trial(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        make_trial(tokenizer, "passkey", 10, 0.5, random.Random(1))


def test_who_looks_back_passes_and_who_does_not_fails(tokenizer: Tokenizer) -> None:
    scores = score_synthetic(
        Oracle(tokenizer), Ignorant(tokenizer), ["key-value"], [100], trials=4, journal=Journal()
    )
    assert [score.depth for score in scores] == list(DEPTHS)
    passed = sum(score.accuracy for score in scores) / len(scores)
    assert passed > 0.8  # two keys may end in the same token
    for score in scores:
        assert score.reference_accuracy == 0
        assert score.reference_answer_nats is not None
        assert score.answer_nats < score.reference_answer_nats


def test_the_surprise_of_an_answer_is_that_of_its_tokens(tiny_mla: Path) -> None:
    scorer = TorchScorer(tiny_mla)
    trial = make_trial(scorer.tokenizer, "passkey", 120, 0.5, random.Random(1))
    found = answer(scorer, trial)
    prompt = scorer.tokenizer.encode(trial.prompt)
    total = 0.0
    for token in scorer.tokenizer.encode(trial.answer, add_special_tokens=False):
        row = scorer.logits(prompt)[-1].astype(np.float64)
        total += float(np.log(np.exp(row - row.max()).sum()) - (row[token] - row.max()))
        prompt.append(token)
    assert found["nats"] == pytest.approx(total, rel=1e-4)


def test_files_of_both_kinds_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    passkeys = tmp_path / "passkey.jsonl"
    passkeys.write_text(json.dumps({"input": "grass 12345 sky", "target": "12345"}) + "\n")
    (trial,) = read_trials(passkeys)
    assert trial.answer == " 12345"
    assert trial.prompt.startswith("grass")
    records = [["k1", "v1\u2028x"], ["k2", "v2"], ["k3", "v3"]]
    pairs = tmp_path / "kv.jsonl.gz"
    entry = {"ordered_kv_records": records, "key": "k2", "value": "v2"}
    pairs.write_bytes(gzip.compress((json.dumps(entry, ensure_ascii=False) + "\n").encode()))
    (trial,) = read_trials(pairs)
    assert (trial.answer, trial.depth) == ("v2", 0.5)
    assert '"k3": "v3"' in trial.prompt
    (score,) = score_file(
        Oracle(tokenizer), None, pairs, limit=None, journal=Journal(), progress=None
    )
    assert (score.task, score.depth, score.trials) == ("kv.jsonl.gz", 0.5, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no trials"),
        (b"{}\n", "line 1, is no trial"),
        (b"[1]\n", "line 1, is no trial"),
        (b'{"input": "a", "target": "b"}\nnot json\n', "line 2, is not JSON"),
        (b'{"ordered_kv_records": [["a"]], "key": "a", "value": "b"}\n', "line 1, is no trial"),
        (b"\xff\n", "not UTF-8"),
    ],
)
def test_files_that_are_no_trials(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "trials.jsonl"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_trials(file)


def test_a_broken_gzip(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"input": "a", "target": "b"}\n' * 99)[:30])
    with pytest.raises(UsageError, match="cannot be read"):
        read_trials(file)


def test_a_prompt_beyond_the_context(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="longer than the model's context"):
        score_synthetic(Oracle(tokenizer), None, ["passkey"], [5000], trials=1, journal=Journal())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4\n#### 1,234", 1234),
        ("#### 18 apples, 7 pears", 18),
        ("that makes $18.50.", 18.5),
        ("-3", -3),
        ("none", None),
        ("5 ####", 5),
    ],
)
def test_the_number_of_an_answer(text: str, number: float | None) -> None:
    assert last_number(text) == number


class Fixed(Oracle):
    """Says the same to everything."""

    prompts: list[str]

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        self.prompts.append(self.tokenizer.decode(ids))
        return " It is\n#### 18"


def test_questions(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    entries = [
        {"question": "How many?", "answer": "x #### 18"}, {"question": "And?", "answer": "#### 3"},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    questions = read_questions(file)
    model = Fixed(tokenizer)
    model.prompts = []
    examples = [Question("Shown?", "Yes. #### 1")]
    found = score_questions(model, questions, examples, max_tokens=20, journal=Journal())
    assert (found.questions, found.accuracy, found.answered, found.examples) == (2, 0.5, 1.0, 1)
    assert (
        model.prompts[0] == "Question: Shown?\nAnswer: Yes. #### 1\n\nQuestion: How many?\nAnswer:"
    )
    with pytest.raises(UsageError, match="too long for the model's context"):
        score_questions(model, questions, examples, max_tokens=4090, journal=Journal())


def test_the_torch_reference_generates_what_its_logits_say(tiny_mla: Path) -> None:
    scorer = TorchScorer(tiny_mla)
    ids = scorer.tokenizer.encode("The old man went to the")
    made = list(ids)
    for _ in range(12):
        made.append(int(scorer.logits(made)[-1].argmax()))
    expected = scorer.tokenizer.decode(made[len(ids) :])
    assert scorer.generate(ids, 12, []) == expected
    stop = expected[8:11]
    assert scorer.generate(ids, 12, [stop]) == expected[: expected.index(stop)]


def test_files_that_are_no_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a"}\n')
    with pytest.raises(UsageError, match="line 1, is no question"):
        read_questions(file)
