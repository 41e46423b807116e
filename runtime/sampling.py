"""From logits to the next token, for loops of one's own; generation samples by itself."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mla_deploy.runtime import _runtime
from mla_deploy.runtime.native import Integers, Logits, token_array
from mla_deploy.runtime.options import GenerationOptions


class Sampler:
    """Picks the tokens of one sequence. The order of the choices: `csrc/core/sampling.h`."""

    def __init__(self, options: GenerationOptions, vocab_size: int) -> None:
        self._core = _runtime.Sampler(options.sampling(), vocab_size)

    def observe(self, ids: Iterable[int]) -> None:
        """Note tokens of the sequence, for the repetition penalty.

        Raises:
            UsageError: one is not of the vocabulary; then none was noted.
        """
        self._core.observe(token_array(list(ids)))

    def pick(self, logits: Logits) -> int:
        """The next token. Shapes: logits [vocab_size].

        Raises:
            UsageError: the logits are of another vocabulary.
            SessionError: they are not numbers.
        """
        return self._core.pick(logits)

    def distribution(self, logits: Logits) -> tuple[Integers, npt.NDArray[np.float64]]:
        """The tokens that can be picked, [n], and their probabilities, [n]. Errors: as `pick`."""
        ids, probabilities = self._core.distribution(logits)
        return np.array(ids, dtype=np.int64), np.array(probabilities)
