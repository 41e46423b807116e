"""Perplexity, and the distance to a reference.

For scored tokens t_1 ... t_n with probabilities p_i that the model gave them:

- perplexity = exp(-(1/n) sum ln p_i)
- bits per byte = -(sum log2 p_i) / (bytes of the text the n tokens stand for); it can be compared
  across tokenizers.

With a reference whose distributions at the same positions are q_i over the whole vocabulary:

- KL_i = sum_v q_i(v) (ln q_i(v) - ln p_i(v)), in nats, of which mean, median, 99th percentile and
  maximum are given;
- top-1 agreement: the share of positions where both prefer the same token.

The same by position: how many tokens of the window a prediction could see.

Logits are turned into probabilities in float64, a few rows at a time; only one figure a position is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mla_deploy.errors import CheckpointError, TokenizerError, UsageError
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.scorer import Scorer
from mla_deploy.evaluate.text import Corpus, Window, check_window, encode_text, windows
from mla_deploy.progress import Progress

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
FIRST_SPAN = 63
"""The first span of positions; each further one is as long as all before it together."""
CHUNK_VALUES = 1 << 22
"""Values turned into float64 at a time: 32 MiB."""


@dataclass(frozen=True)
class Comparison:
    """How far a model is from its reference, at the same positions."""

    reference_perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float


@dataclass(frozen=True)
class PositionScores:
    """The scores of the predictions that saw `first` to `last` tokens."""

    first: int
    last: int
    tokens: int
    perplexity: float
    reference_perplexity: float | None
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    tokens: int
    """Tokens that were scored."""
    bytes: int
    """Bytes of text they stand for."""
    window: int
    stride: int
    perplexity: float
    bits_per_byte: float | None
    """None where the tokens stand for no text."""
    comparison: Comparison | None
    score_from: int
    """Predictions that saw fewer tokens than this were left out."""
    by_position: tuple[PositionScores, ...]
    """Spans that double in length."""


def evaluate(
    model: Scorer,
    text: str,
    *,
    reference: Scorer | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    score_from: int = 1,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a text with a model, and against a reference if there is one.

    Args:
        window: tokens seen at a time; `min(512, context)` if not given. The perplexity of a short
            window is higher, so compare only figures of equal window and stride.
        stride: tokens between the starts of windows; the window itself if not given, so that no
            token is computed twice.
        score_from: leave out predictions that see fewer tokens of their window. mlx-lm scores
            windows of 512 without overlap and leaves nothing out; llama.cpp scores the second half
            of each: 257 of 512.
        journal: what an earlier run of the same evaluation has finished.
        max_tokens: take only so many tokens from the start of the text.
        progress: called with (tokens done, tokens in all, "").

    Raises:
        UsageError: too little text, or a window that does not fit.
        TokenizerError: the reference splits the text into other tokens.
        CheckpointError: logits that are not finite, or of another vocabulary.
    """
    corpus = encode_text(model.tokenizer, text, max_tokens)
    if reference is not None:
        _check_same_tokens(model, reference, text, corpus, max_tokens)
    contexts = [model.context] + ([] if reference is None else [reference.context])
    window, stride = check_window(window, stride, contexts, len(corpus.start))
    if not 1 <= score_from < window:
        raise UsageError(
            "no prediction of a window sees so many tokens",
            found=f"{score_from} tokens, and windows of {window}",
            allowed=f"1 to {window - 1}",
            hint="give another --score-from",
        )
    journal = journal or Journal()
    parts: list[_WindowScores] = []
    for whole in windows(corpus, window, stride):
        part = whole.scored_from(score_from)
        if part is None:
            continue

        def score(part: Window = part) -> dict[str, Any]:
            return asdict(_score(model, reference, part))

        parts.append(_WindowScores(**journal.item(f"text {part.offset}", score)))
        if progress is not None:
            progress(part.offset + len(part.ids) - part.first, len(corpus.ids), "")
    if progress is not None:
        progress(len(corpus.ids), len(corpus.ids), "")
    if not parts:
        raise UsageError(
            "the text is too short to be scored",
            found=f"{len(corpus.ids)} tokens",
            allowed=f"more than {score_from}, where predictions are to see so many",
        )
    rows = _Rows(
        seen=np.concatenate([np.array(part.seen) for part in parts]),
        nats=_joined([part.nats for part in parts]),
        reference_nats=_joined([part.reference_nats for part in parts]),
        divergence=_joined([part.divergence for part in parts]),
        agreement=_joined([part.agreement for part in parts]),
    )
    scored_bytes = sum(
        sum(corpus.token_bytes[part.offset : part.offset + len(part.nats)]) for part in parts
    )
    total = float(rows.nats.sum())
    return Evaluation(
        tokens=len(rows.nats),
        bytes=scored_bytes,
        window=window,
        stride=stride,
        perplexity=_perplexity(rows.nats),
        bits_per_byte=total / math.log(2) / scored_bytes if scored_bytes else None,
        comparison=None if reference is None else _compare(rows),
        score_from=score_from,
        by_position=tuple(_by_position(rows)),
    )


@dataclass(frozen=True)
class _WindowScores:
    """One window: a figure for each scored token; what needs a reference is empty without one."""

    offset: int
    seen: list[int]
    nats: list[float]
    reference_nats: list[float]
    divergence: list[float]
    agreement: list[float]


@dataclass(frozen=True)
class _Rows:
    """The figures of all windows. Shapes: [tokens], or [0] without a reference."""

    seen: npt.NDArray[np.int64]
    nats: Floats
    reference_nats: Floats
    divergence: Floats
    agreement: Floats

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Rows:
        """Those of some tokens."""

        def some(values: Floats) -> Floats:
            return values[chosen] if len(values) else values

        return _Rows(
            self.seen[chosen],
            self.nats[chosen],
            some(self.reference_nats),
            some(self.divergence),
            some(self.agreement),
        )


def _joined(parts: Sequence[Sequence[float]]) -> Floats:
    return np.concatenate([np.array(part, dtype=np.float64) for part in parts])


def _score(model: Scorer, reference: Scorer | None, part: Window) -> _WindowScores:
    targets = np.array(part.ids[part.first :])
    found = _scored_logits(model, part)
    seen = list(range(part.first, part.first + len(targets)))
    nats = _surprise(found, targets).tolist()
    if reference is None:
        return _WindowScores(part.offset, seen, nats, [], [], [])
    expected = _scored_logits(reference, part)
    _check_same_vocabulary(model, found, reference, expected)
    return _WindowScores(
        part.offset,
        seen,
        nats,
        _surprise(expected, targets).tolist(),
        _divergence(expected, found).tolist(),
        (found.argmax(-1) == expected.argmax(-1)).astype(float).tolist(),
    )


def _by_position(rows: _Rows) -> Iterator[PositionScores]:
    first = 1
    longest = int(rows.seen.max())
    while first <= longest:
        last = FIRST_SPAN if first == 1 else 2 * first - 1
        part = rows.where((rows.seen >= first) & (rows.seen <= last))
        if len(part.nats):
            compared = _compare(part) if len(part.divergence) else None
            yield PositionScores(
                first=first,
                last=min(last, longest),
                tokens=len(part.nats),
                perplexity=_perplexity(part.nats),
                reference_perplexity=None if compared is None else compared.reference_perplexity,
                kl_mean=None if compared is None else compared.kl_mean,
                kl_median=None if compared is None else compared.kl_median,
                kl_p99=None if compared is None else compared.kl_p99,
                top1_agreement=None if compared is None else compared.top1_agreement,
            )
        first = last + 1


def _compare(rows: _Rows) -> Comparison:
    return Comparison(
        reference_perplexity=_perplexity(rows.reference_nats),
        kl_mean=float(rows.divergence.mean()),
        kl_median=float(np.median(rows.divergence)),
        kl_p99=float(np.percentile(rows.divergence, 99)),
        kl_max=float(rows.divergence.max()),
        top1_agreement=float(rows.agreement.mean()),
    )


def _perplexity(nats: Floats) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(nats.mean()))


def _scored_logits(model: Scorer, part: Window) -> Logits:
    """The rows that predict the scored tokens. Shapes: to [scored, vocab_size]."""
    logits = model.logits(part.ids[:-1])[part.first - 1 :]
    if not np.isfinite(logits).all():
        row = int(np.argmin(np.isfinite(logits).all(-1)))
        raise CheckpointError(
            f"{model.name} gives logits that are not finite",
            found=f"at token {part.offset + row} of the text",
            hint="look at its weights for NaN, or quantize and export it again",
        )
    return logits


def _surprise(logits: Logits, targets: npt.NDArray[np.int64]) -> Floats:
    """-ln p of each target. Shapes: logits [N, vocab_size], targets [N], to [N]."""
    nats = np.empty(len(targets))
    for rows in _chunks(logits):
        wide = _log_softmax(logits[rows])
        nats[rows] = -wide[np.arange(len(wide)), targets[rows]]
    return nats


def _divergence(expected: Logits, found: Logits) -> Floats:
    """KL(expected || found) of each row. Shapes: two [N, vocab_size], to [N]."""
    nats = np.empty(len(found))
    for rows in _chunks(found):
        log_q = _log_softmax(expected[rows])
        nats[rows] = (np.exp(log_q) * (log_q - _log_softmax(found[rows]))).sum(-1)
    # Rounding leaves some -1e-17 where the distributions are equal.
    return np.maximum(nats, 0.0)


def _log_softmax(logits: Logits) -> Floats:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    shifted: Floats = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return shifted


def _chunks(logits: Logits) -> list[slice]:
    step = max(1, CHUNK_VALUES // logits.shape[1])
    return [slice(row, row + step) for row in range(0, len(logits), step)]


def _check_same_tokens(
    model: Scorer, reference: Scorer, text: str, corpus: Corpus, max_tokens: int | None
) -> None:
    other = encode_text(reference.tokenizer, text, max_tokens)
    if other.start + other.ids == corpus.start + corpus.ids:
        return
    pairs = zip(other.start + other.ids, corpus.start + corpus.ids, strict=False)
    place = next((index for index, (a, b) in enumerate(pairs) if a != b), "the end")
    raise TokenizerError(
        f"{reference.name} has another tokenizer than {model.name}",
        found=f"{len(other.ids)} tokens against {len(corpus.ids)}, different from {place} on",
        allowed="a reference that splits the text into the same tokens",
        hint="compare with the model that this one was made from",
    )


def _check_same_vocabulary(
    model: Scorer, found: Logits, reference: Scorer, expected: Logits
) -> None:
    if found.shape == expected.shape:
        return
    raise CheckpointError(
        f"{model.name} and {reference.name} have vocabularies of different sizes",
        found=f"{found.shape[1]} and {expected.shape[1]} logits a token",
        hint="compare with the model that this one was made from",
    )
