"""The text of a calibration: read, checked, and cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_deploy.config import MlaConfig
from mla_deploy.errors import ConfigError, UsageError
from mla_deploy.evaluate.text import DEFAULT_WINDOW, encode_text, read_text, windows
from mla_deploy.tokenizer import Tokenizer

MIN_TOKENS = 64
MAX_TOKENS = 4096
"""Tokens that are looked at, spread evenly over the text; more change the choices little."""


@dataclass(frozen=True)
class CalibrationText:
    """The text, read and checked before any work."""

    windows: tuple[tuple[int, ...], ...]

    @classmethod
    def read(
        cls,
        paths: Sequence[Path | str],
        model: Path,
        config: MlaConfig,
        tokens: int = MAX_TOKENS,
    ) -> CalibrationText:
        """Read the files and cut them into the windows that are looked at, so many tokens of them.

        Raises:
            UsageError: a file that is missing, empty, not UTF-8, or too short all together.
            TokenizerError: the model has no tokenizer.
        """
        text = "\n\n".join(read_text(path) for path in paths)
        names = ", ".join(str(path) for path in paths)
        tokenizer = Tokenizer.open(model)
        corpus = encode_text(tokenizer, text)
        if len(corpus.ids) < MIN_TOKENS:
            raise UsageError(
                f"the calibration text {names} is too short",
                found=f"{len(corpus.ids)} tokens",
                allowed=f"{MIN_TOKENS} or more; {MAX_TOKENS} are looked at",
                hint="give a text such as the model will read, of some pages",
            )
        if max(corpus.ids) >= config.vocab_size:
            raise ConfigError(
                f"the tokenizer of {model} has tokens that the model does not know",
                found=f"token {max(corpus.ids)}",
                allowed=f"0 to {config.vocab_size - 1}",
                hint="take the tokenizer and the weights from the same model",
            )
        size = min(DEFAULT_WINDOW, config.max_position_embeddings)
        every = [part.ids for part in windows(corpus, size, size - len(corpus.start))]
        wanted = max(1, tokens // size)
        step = max(1, len(every) // wanted)
        chosen = tuple(part for part in every[::step][:wanted] if len(part) > 1)
        return cls(chosen)
