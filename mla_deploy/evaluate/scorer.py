"""`Scorer`: what evaluation needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mla_deploy.errors import CheckpointError
from mla_deploy.tokenizer import Tokenizer


class Scorer(Protocol):
    """Gives the logits of fresh windows of tokens."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own."""

    @property
    def context(self) -> int:
        """The longest window, in tokens."""

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the model expects after each token of a fresh sequence.

        Shapes: ids [S], to [S, vocab_size].
        """


class TextGenerator(Scorer, Protocol):
    """A scorer that can also continue a prompt."""

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        """The greedy continuation, without the stop string that ended it."""


class TorchScorer:
    """A checkpoint, quantised or not, computed by the torch reference in float32.

    The cache is the one of the checkpoint's recipe, so that its rounding is part of the figures.

    Raises (on opening):
        ConfigError, CheckpointError, TokenizerError: the checkpoint cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        from mla_deploy.families import load_config
        from mla_deploy.model import load_model

        self.name = str(path)
        self._config = load_config(path)
        self.tokenizer = Tokenizer.open(path)
        self._model = load_model(path)
        self.context = self._config.max_position_embeddings

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        import torch

        from mla_deploy.model import forward_window

        self._check(ids)
        window = torch.tensor([list(ids)])
        found: npt.NDArray[np.float32] = (
            forward_window(self._model, self._config, window)[0].float().numpy()
        )
        return found

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        import torch

        from mla_deploy.cache import pages_for
        from mla_deploy.model import empty_cache

        self._check(ids)
        pages = pages_for(len(ids) + max_tokens)
        table = torch.arange(1, pages + 1).unsqueeze(0)
        cache = empty_cache(self._config, pages + 1)
        made: list[int] = []
        text, past, new = "", 0, list(ids)
        while len(made) < max_tokens:
            with torch.no_grad():
                logits, cache = self._model(
                    torch.tensor([new]),
                    torch.tensor([past]),
                    torch.tensor([len(new)]),
                    table,
                    torch.tensor([[len(new) - 1]]),
                    cache,
                )
            past += len(new)
            new = [int(logits[0, 0].argmax())]
            if new[0] in self.tokenizer.eos_token_ids:
                break
            made += new
            text = self.tokenizer.decode(made)
            ends = [at for at in (text.find(one) for one in stop) if at >= 0]
            if ends:
                return text[: min(ends)]
        return text

    def _check(self, ids: Sequence[int]) -> None:
        if max(ids) >= self._config.vocab_size:
            raise CheckpointError(
                f"the tokenizer of {self.name} has tokens that the model does not know",
                found=f"token {max(ids)}",
                allowed=f"0 to {self._config.vocab_size - 1}",
                hint="take the tokenizer and the weights from the same model",
            )
