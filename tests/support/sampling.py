"""The next token by the definition, one token at a time, for holding samplers against."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt


def distribution(
    logits: npt.NDArray[np.float32],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    occurred: Collection[int] = (),
) -> tuple[list[int], npt.NDArray[np.float64]]:
    """The tokens that can be picked and their probabilities.

    In falling order where top_k or top_p cut them off, else by token: a seed draws by this order.
    """
    penalty = np.float32(repetition_penalty)
    scores = [float(x) for x in logits]
    for i in set(occurred):
        scores[i] = float(logits[i] / penalty if logits[i] > 0 else logits[i] * penalty)
    scores = [x / temperature for x in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if top_k:
        order = order[:top_k]
    top = max(scores)
    weights = {i: np.exp(scores[i] - top) for i in order}
    total = sum(weights.values())
    if top_p < 1:
        kept, reached = [], 0.0
        for i in order:
            if reached >= top_p:
                break
            kept.append(i)
            reached += weights[i] / total
        order = kept
    largest = max(weights[i] for i in order)
    order = [i for i in order if weights[i] >= min_p * largest * (1 - 1e-12)]
    if top_p == 1 and not 0 < top_k < len(scores):
        order.sort()
    total = sum(weights[i] for i in order)
    return order, np.array([weights[i] / total for i in order])


def dense(found: tuple[npt.ArrayLike, npt.ArrayLike], vocab_size: int) -> npt.NDArray[np.float64]:
    """A distribution over the whole vocabulary."""
    ids = np.asarray(found[0], dtype=np.int64)
    assert len(set(ids.tolist())) == len(ids)
    full = np.zeros(vocab_size)
    full[ids] = found[1]
    return full


def draws(found: tuple[list[int], npt.NDArray[np.float64]], seed: int, count: int) -> list[int]:
    """What numpy's generator picks from a distribution, by its cumulative sum."""
    random = np.random.default_rng(seed)
    ids, probabilities = found
    cumulative = probabilities.cumsum()
    at = [
        np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
        for _ in range(count)
    ]
    return [ids[index] for index in at]
