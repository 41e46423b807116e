"""What every loaded bundle knows about text, whatever computes it."""

from __future__ import annotations

import functools

from mla_deploy.bundle import Bundle
from mla_deploy.tokenizer import TOKENIZER, Tokenizer


class BundleText:
    """Tokenizer and end tokens of a bundle; a base of engines.

    Attributes:
        bundle: what was loaded.
    """

    bundle: Bundle

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            TokenizerError: the bundle has none, or it is broken.
        """
        return Tokenizer.open(self.bundle)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle brings a tokenizer; without one, prompts are token ids."""
        return self.bundle.has(TOKENIZER)

    @functools.cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset(self.bundle.manifest.model.eos_token_ids)
