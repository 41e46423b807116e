"""Perplexity, and the distance to a reference.

For scored tokens t_1 ... t_n with probabilities p_i that the model gave them:

- perplexity = exp(-(1/n) sum ln p_i)
- bits per byte = -(sum log2 p_i) / (bytes of the text the n tokens stand for); it can be compared
  across tokenizers.

With a reference whose distributions at the same positions are q_i over the whole vocabulary:

- KL_i = sum_v q_i(v) (ln q_i(v) - ln p_i(v)), in nats, of which mean, median, 99th percentile and
  maximum are given;
- top-1 agreement: the share of positions where both prefer the same token.

Logits are turned into probabilities in float64, a few rows at a time; only one figure a position is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mla_deploy.errors import CheckpointError, TokenizerError
from mla_deploy.evaluate.scorer import Scorer
from mla_deploy.evaluate.text import Corpus, Window, check_window, encode_text, windows

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
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


def evaluate(
    model: Scorer,
    text: str,
    *,
    reference: Scorer | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Evaluation:
    """Score a text with a model, and against a reference if there is one.

    Args:
        window: tokens seen at a time; `min(512, context)` if not given. The perplexity of a short
            window is higher, so compare only figures of equal window and stride.
        stride: tokens between the starts of windows; the window itself if not given, so that no
            token is computed twice. Half the window is what llama.cpp's figures come closest to.
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
    surprise: list[Floats] = []
    reference_surprise: list[Floats] = []
    divergence: list[Floats] = []
    agreement = 0
    scored_bytes = 0
    for part in windows(corpus, window, stride):
        targets = np.array(part.ids[part.first :])
        found = _scored_logits(model, part)
        surprise.append(_surprise(found, targets))
        scored_bytes += sum(corpus.token_bytes[part.offset : part.offset + len(targets)])
        if reference is not None:
            expected = _scored_logits(reference, part)
            _check_same_vocabulary(model, found, reference, expected)
            reference_surprise.append(_surprise(expected, targets))
            divergence.append(_divergence(expected, found))
            agreement += int((found.argmax(-1) == expected.argmax(-1)).sum())
        if progress is not None:
            progress(part.offset + len(targets), len(corpus.ids), "")
    if progress is not None:
        progress(len(corpus.ids), len(corpus.ids), "")
    nats = np.concatenate(surprise)
    return Evaluation(
        tokens=len(nats),
        bytes=scored_bytes,
        window=window,
        stride=stride,
        perplexity=_perplexity(nats),
        bits_per_byte=float(nats.sum() / math.log(2) / scored_bytes) if scored_bytes else None,
        comparison=None
        if reference is None
        else _compare(np.concatenate(reference_surprise), np.concatenate(divergence), agreement),
    )


def _compare(reference_nats: Floats, divergence: Floats, agreement: int) -> Comparison:
    return Comparison(
        reference_perplexity=_perplexity(reference_nats),
        kl_mean=float(divergence.mean()),
        kl_median=float(np.median(divergence)),
        kl_p99=float(np.percentile(divergence, 99)),
        kl_max=float(divergence.max()),
        top1_agreement=agreement / len(divergence),
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
