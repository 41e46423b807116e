"""Perplexity and distance to a reference, against sums written out naively."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mla_deploy.errors import CheckpointError, TokenizerError, UsageError
from mla_deploy.evaluate import Scorer, evaluate
from mla_deploy.evaluate import scores as scores_module
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.scorer import TorchScorer
from mla_deploy.tokenizer import Tokenizer

TEXT = (
    "A river has no plan. At every point it goes where it can go most easily, and all those small "
    "choices together make a shape that is nearly the same on every continent."
)


class PairScorer:
    """Logits that depend on the last two tokens, so that a window's start can be seen in them."""

    def __init__(self, tokenizer: Tokenizer, seed: int, sharpness: float = 3.0) -> None:
        self.name = f"pairs-{seed}"
        self.tokenizer = tokenizer
        self.context = 64
        draw = np.random.default_rng(seed)
        size = (2, tokenizer.vocab_size, tokenizer.vocab_size)
        self.tables = (draw.standard_normal(size) * sharpness).astype(np.float32)
        self.longest = 0

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.longest = max(self.longest, len(ids))
        found = self.tables[0, list(ids)]
        found[1:] += self.tables[1, list(ids[:-1])]
        return found


@pytest.fixture(scope="module")
def tokenizer(tiny_mla: Path) -> Tokenizer:
    return Tokenizer.open(tiny_mla)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> PairScorer:
    return PairScorer(tokenizer, 1)


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer) -> PairScorer:
    return PairScorer(tokenizer, 2)


def log_probabilities(row: npt.NDArray[np.float32]) -> list[float]:
    wide = [float(value) for value in row]
    top = max(wide)
    total = math.fsum(math.exp(value - top) for value in wide)
    return [value - top - math.log(total) for value in wide]


def test_all_figures_follow_their_definitions(
    model: PairScorer, reference: PairScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small chunks, so that a wrong border between them would show.
    monkeypatch.setattr(scores_module, "CHUNK_VALUES", 3 * model.tokenizer.vocab_size)
    ids = model.tokenizer.encode(TEXT)
    window, stride = 12, 5
    rows: dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}
    for begin in range(0, len(ids), stride):
        part = ids[begin : begin + window]
        p, q = model.logits(part), reference.logits(part)
        for place in range(1, len(part)):
            rows.setdefault(begin + place, (p[place - 1], q[place - 1]))
    nats, reference_nats, divergences, same = [], [], [], 0
    for place in range(1, len(ids)):
        log_p, log_q = (log_probabilities(row) for row in rows[place])
        nats.append(-log_p[ids[place]])
        reference_nats.append(-log_q[ids[place]])
        divergences.append(
            math.fsum(math.exp(b) * (b - a) for a, b in zip(log_p, log_q, strict=True))
        )
        same += log_p.index(max(log_p)) == log_q.index(max(log_q))

    found = evaluate(model, TEXT, reference=reference, window=window, stride=stride)

    size = len(TEXT.encode()) - len(model.tokenizer.token_bytes(ids[0]))
    assert (found.tokens, found.bytes) == (len(ids) - 1, size)
    assert found.perplexity == pytest.approx(math.exp(math.fsum(nats) / len(nats)), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(math.fsum(nats) / math.log(2) / size, rel=1e-12)
    compared = found.comparison
    assert compared is not None
    assert dataclasses.asdict(compared) == pytest.approx(
        {
            "reference_perplexity": math.exp(math.fsum(reference_nats) / len(nats)),
            "kl_mean": math.fsum(divergences) / len(nats),
            "kl_median": float(np.median(divergences)),
            "kl_p99": float(np.percentile(divergences, 99)),
            "kl_max": max(divergences),
            "top1_agreement": same / len(nats),
        },
        rel=1e-10,
    )


def test_figures_by_position_are_those_of_the_predictions_that_saw_so_much(
    model: PairScorer, reference: PairScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "FIRST_SPAN", 3)
    whole = evaluate(model, TEXT, reference=reference, window=16)
    assert [(one.first, one.last) for one in whole.by_position] == [(1, 3), (4, 7), (8, 15)]
    assert sum(one.tokens for one in whole.by_position) == whole.tokens
    assert whole.comparison is not None
    mean = sum((one.kl_mean or 0) * one.tokens for one in whole.by_position) / whole.tokens
    assert mean == pytest.approx(whole.comparison.kl_mean)
    late = evaluate(model, TEXT, reference=reference, window=16, score_from=8)
    assert late.comparison is not None
    last = whole.by_position[-1]
    assert (late.tokens, late.perplexity) == (last.tokens, pytest.approx(last.perplexity))
    assert (late.comparison.kl_mean, late.comparison.top1_agreement) == (
        pytest.approx(last.kl_mean),
        pytest.approx(last.top1_agreement),
    )


@pytest.mark.parametrize("score_from", [0, 16, 100])
def test_nothing_sees_so_many_tokens(model: PairScorer, score_from: int) -> None:
    with pytest.raises(UsageError, match="sees so many tokens"):
        evaluate(model, TEXT, window=16, score_from=score_from)


def test_it_goes_on_where_it_was_stopped(
    model: PairScorer, reference: PairScorer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    expected = evaluate(model, TEXT, reference=reference, window=12)

    class Stopping(PairScorer):
        left = 2

        def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().logits(ids)

    stopping = Stopping(tokenizer, 1)
    file = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopping, TEXT, reference=reference, window=12, journal=Journal(file, {}))
    stopping.left = len(tokenizer.encode(TEXT)) // 12 + 1 - 2
    found = evaluate(stopping, TEXT, reference=reference, window=12, journal=Journal(file, {}))
    assert found == expected


def test_huge_logits_do_not_overflow(tokenizer: Tokenizer) -> None:
    model, other = (PairScorer(tokenizer, seed, sharpness=1e4) for seed in (1, 2))
    found = evaluate(model, TEXT, reference=other)
    assert found.comparison is not None
    assert 1e3 < found.comparison.kl_mean < 1e6
    assert found.perplexity == math.inf
    assert found.bits_per_byte is not None
    assert math.isfinite(found.bits_per_byte)


def test_a_model_is_at_no_distance_from_itself(model: PairScorer) -> None:
    compared = evaluate(model, TEXT, reference=model).comparison
    assert compared is not None
    assert (compared.kl_max, compared.top1_agreement) == (0.0, 1.0)


def test_no_window_exceeds_the_shorter_context(model: PairScorer, tokenizer: Tokenizer) -> None:
    short = PairScorer(tokenizer, 3)
    short.context = 16
    model.longest = 0
    found = evaluate(model, TEXT, reference=short)
    assert (found.window, model.longest, short.longest) == (16, 15, 15)


def test_progress_ends_at_the_number_of_tokens(model: PairScorer) -> None:
    calls: list[tuple[int, int]] = []
    evaluate(model, TEXT, window=8, progress=lambda done, total, _: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == len(model.tokenizer.encode(TEXT))
    assert calls == sorted(calls)


def test_a_reference_with_another_tokenizer_is_refused(
    model: PairScorer, tiny_mla: Path, tmp_path: Path
) -> None:
    spec = json.loads((tiny_mla / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:200]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    shutil.copy(tiny_mla / "tokenizer_config.json", tmp_path)
    other = PairScorer(Tokenizer.open(tmp_path), 2)
    with pytest.raises(TokenizerError, match="another tokenizer") as caught:
        evaluate(model, TEXT, reference=other)
    assert "tokens against" in str(caught.value)


def test_a_reference_with_another_vocabulary_is_refused(
    model: PairScorer, tokenizer: Tokenizer
) -> None:
    class Wider(PairScorer):
        def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
            return np.pad(super().logits(ids), ((0, 0), (0, 8)))

    with pytest.raises(CheckpointError, match="vocabularies of different sizes"):
        evaluate(model, TEXT, reference=Wider(tokenizer, 2))


def test_logits_that_are_not_finite_are_an_error_that_says_where(
    model: PairScorer, tokenizer: Tokenizer
) -> None:
    class Broken(PairScorer):
        def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
            found = super().logits(ids)
            found[6, 3] = np.nan
            return found

    with pytest.raises(CheckpointError, match="not finite") as caught:
        evaluate(Broken(tokenizer, 1), TEXT)
    assert "token 7 of the text" in str(caught.value)


def test_the_torch_reference_scores_a_checkpoint(tiny_mla: Path) -> None:
    scorer: Scorer = TorchScorer(tiny_mla)
    ids = scorer.tokenizer.encode(TEXT)
    logits = scorer.logits(ids)
    assert logits.shape == (len(ids), 4096)
    assert logits.dtype == np.float32
    # A trained model, so far from guessing; the exact figure is held in tests/model.
    assert evaluate(scorer, TEXT).perplexity < 400


def test_too_little_text_is_refused(model: PairScorer) -> None:
    with pytest.raises(UsageError, match="too short"):
        evaluate(model, "a")
