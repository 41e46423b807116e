"""The adapter to lm-evaluation-harness, on a task with local files: nothing is fetched."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.harness import _likelihood, _rolling, _split, run_tasks
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.scorer import TorchScorer

pytest.importorskip("lm_eval")

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SAY = """\
task: local_say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/say.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def scorer(tiny_mla: Path) -> TorchScorer:
    return TorchScorer(tiny_mla)


@pytest.fixture
def folder(tmp_path: Path, scorer: TorchScorer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks whose right answers are what the model says."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    said = scorer.generate(scorer.tokenizer.encode("The old man went to the"), 8, ["."])
    choice = [
        {"question": "The old man went to the", "choices": [said, " zzqx zzqx"], "label": 0},
        {"question": "The old man went to the", "choices": [said, " zzqx zzqx"], "label": 1},
    ]
    say = [{"question": "The old man went to the", "answer": said}]
    for name, entries, task in (("choice", choice, CHOICE), ("say", say, SAY)):
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / f"{name}.jsonl").write_text(lines)
        (tmp_path / f"{name}.yaml").write_text(task.format(folder=tmp_path))
    return tmp_path


def test_tasks_with_local_files(folder: Path, scorer: TorchScorer) -> None:
    journal = Journal(folder / "journal.jsonl", {})
    tasks = ["local_choice", "local_say"]
    found = run_tasks(scorer, tasks, task_path=folder, offline=True, journal=journal)
    assert found["local_choice"]["acc,none"] == 0.5
    assert found["local_say"]["exact_match,none"] == 1.0

    class Dead(TorchScorer):
        """All was finished before."""

        def __init__(self) -> None:
            self.name, self.tokenizer, self.context = "dead", scorer.tokenizer, scorer.context

    again = run_tasks(
        Dead(), tasks, task_path=folder, offline=True, journal=Journal(folder / "journal.jsonl", {})
    )
    assert again["local_choice"]["acc,none"] == 0.5


@pytest.mark.slow
def test_an_unknown_task(folder: Path, scorer: TorchScorer) -> None:
    with pytest.raises(UsageError, match="no such task") as error:
        run_tasks(scorer, ["local_choice", "no_such_task"], task_path=folder, offline=True)
    assert error.value.found == "no_such_task"


def test_a_likelihood_is_the_sum_over_the_continuation(scorer: TorchScorer) -> None:
    context, target = _split(scorer, "It was a bright cold day ", "in April")
    assert context + target == scorer.tokenizer.encode("It was a bright cold day in April")
    total, is_greedy = _likelihood(scorer, context, target)
    ids, expected, greedy = list(context), 0.0, True
    for token in target:
        row = scorer.logits(ids)[-1].astype(np.float64)
        expected += row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
        greedy &= int(row.argmax()) == token
        ids.append(token)
    assert total == pytest.approx(expected, rel=1e-4)
    assert bool(is_greedy) == greedy


class Uniform:
    """Every token as likely as any other, in windows of 8."""

    name, context = "uniform", 8

    def __init__(self, scorer: TorchScorer) -> None:
        self.tokenizer = scorer.tokenizer
        self.seen: list[list[int]] = []

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.seen.append(list(ids))
        return np.zeros((len(ids), 4096), np.float32)

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        return ""


def test_a_rolling_likelihood_counts_every_token_once(scorer: TorchScorer) -> None:
    model = Uniform(scorer)
    text = "It was a bright cold day in April, and the clocks were striking thirteen."
    count = len(scorer.tokenizer.encode(text))
    assert _rolling(model, text) == pytest.approx(-count * math.log(4096))
    assert max(len(seen) for seen in model.seen) < 8
    assert _split(model, "", "a")[0], "a text without context needs a token to start from"
