"""From logits to the next token.

The order is that of transformers, so that the same options mean the same:

1. repetition penalty on every token that occurred in prompt or output: a positive logit is divided
   by it, a negative one multiplied (Keskar et al., arXiv 1909.05858);
2. temperature: 0 takes the largest logit and ends here, else logits are divided by it;
3. top-k: the k largest logits stay;
4. top-p: of these, most likely first, as many as reach the probability together stay, at least
   one (Holtzman et al., arXiv 1904.09751);
5. min-p: of these, tokens less likely than min_p times the most likely one go (arXiv 2407.01082);
6. one uniform number per token picks by the cumulative distribution.

Of equal logits, the one of the lower token id counts as the larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mla_deploy.errors import SessionError
from mla_deploy.runtime.graph import Integers
from mla_deploy.runtime.options import GenerationOptions

FIRST_LOOK = 256
"""Top-p sorts so many tokens first: to sort a vocabulary of 100k takes milliseconds a token."""

Floats = npt.NDArray[np.float64]


class Sampler:
    """Picks tokens of one sequence."""

    def __init__(self, options: GenerationOptions, vocab_size: int) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._occurred = np.zeros(vocab_size, dtype=np.bool_)

    def observe(self, ids: Iterable[int]) -> None:
        """Note tokens of the sequence, for the repetition penalty."""
        self._occurred[list(ids)] = True

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token. Shapes: logits [vocab_size].

        Raises:
            SessionError: the logits are not numbers.
        """
        top = logits.max()
        if not np.isfinite(top):
            raise SessionError(
                "the model's logits are not finite",
                found=top,
                hint="check the checkpoint for broken weights; a model that overflows in fp16 "
                "needs another export",
            )
        if self._options.repetition_penalty != 1:
            logits = self._penalised(logits)
        if self._options.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = self.distribution(logits)
        cumulative = probabilities.cumsum()
        drawn = self._random.random() * cumulative[-1]
        return int(ids[np.searchsorted(cumulative, drawn, side="right")])

    def distribution(self, logits: npt.NDArray[np.float32]) -> tuple[Integers, Floats]:
        """Steps 2 to 5: the tokens that can be picked, [n], and their probabilities, [n]."""
        options = self._options
        scores = logits.astype(np.float64) / options.temperature
        scores -= scores.max()
        ids: Integers | None = None
        if 0 < options.top_k < len(scores):
            ids = _largest(scores, options.top_k)
        if options.top_p < 1:
            ids = (
                _nucleus(scores, options.top_p)
                if ids is None
                else ids[: _cut(scores[ids], options.top_p, float(np.exp(scores[ids]).sum()))]
            )
        if ids is None:
            ids = np.arange(len(scores))
        if options.min_p > 0:
            ids = ids[scores[ids] >= math.log(options.min_p)]
        weights = np.exp(scores[ids])
        return ids, weights / weights.sum()

    def _penalised(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        penalty = np.float32(self._options.repetition_penalty)
        logits = logits.copy()
        met = logits[self._occurred]
        logits[self._occurred] = np.where(met > 0, met / penalty, met * penalty)
        return logits


def _largest(scores: Floats, count: int) -> Integers:
    """Ids of the `count` largest scores, in falling order."""
    threshold = np.partition(scores, -count)[-count]
    ids = np.flatnonzero(scores >= threshold)  # rising ids, which the stable sort keeps
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def _nucleus(scores: Floats, top_p: float) -> Integers:
    """Ids of the most likely tokens that have the probability `top_p` together."""
    total = float(np.exp(scores).sum())
    looked_at = min(FIRST_LOOK, len(scores))
    while True:
        ids = _largest(scores, looked_at)
        size = _cut(scores[ids], top_p, total)
        if size < looked_at or looked_at == len(scores):
            return ids[:size]
        looked_at = min(8 * looked_at, len(scores))


def _cut(falling_scores: Floats, top_p: float, total: float) -> int:
    """How many of the scores reach `top_p` of the total weight together."""
    reached = np.exp(falling_scores).cumsum() / total
    return min(int(np.searchsorted(reached, top_p, side="left")) + 1, len(reached))
