"""A session for `bench`: one that can be filled without computing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mla_deploy.runtime import Engine


class FillableSession:
    """A session of the runtime that grows by copying pages of what it holds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.session = engine.session()

    def prefill(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return self.session.prefill(ids)

    def rewind(self, length: int) -> None:
        self.session.rewind(length)

    def fill_by_copies(self, length: int) -> None:
        """Grow to `length` tokens: whole pages are copied, in turn, into pages of their own."""
        session, arena = self.session, self._engine._arena
        held = session.length
        if held >= length:
            return
        whole = held // arena.page_tokens
        session.rewind(whole * arena.page_tokens)
        tokens, sources = session.tokens, list(session.pages.pages)
        session.pages.reserve(session.length, length)
        for index, page in enumerate(session.pages.pages[whole:]):
            for array in arena.arrays.values():
                array[page] = array[sources[index % whole]]
        missing = length - session.length
        session.appended((list(tokens) * (missing // len(tokens) + 1))[:missing])
