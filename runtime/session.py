"""A sequence of tokens in the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mla_deploy.errors import SessionError
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.cancellation import Cancellation
from mla_deploy.runtime.closing import Closing
from mla_deploy.runtime.native import Integers, Logits, token_array

if TYPE_CHECKING:
    from mla_deploy.runtime.engine import Engine


class Session(Closing):
    """One sequence: made by `Engine.session`, closed by `close` or at the end of a `with`.

    After an error a session holds the tokens it held before the call, and goes on working. Threads
    may share one; what they do to it then comes in any order.
    """

    def __init__(self, engine: Engine, core: _runtime.Session) -> None:
        """Use `Engine.session` or `fork`."""
        self.engine = engine
        self._core: _runtime.Session | None = core

    @property
    def core(self) -> _runtime.Session:
        """The session in C++.

        Raises:
            SessionError: the session is closed.
        """
        core = self._core
        if core is None:
            raise SessionError("the session is closed", hint="make another with Engine.session()")
        return core

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return 0 if self.closed else self.core.length

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return () if self.closed else tuple(self.core.tokens())

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core is None

    @property
    def room(self) -> int:
        """Tokens that can be added now: the model's context and the free pages allow so many."""
        return 0 if self.closed else self.core.room

    @property
    def cache_bytes(self) -> int:
        """Bytes of this session's pages, those shared with forks included."""
        return 0 if self.closed else self.core.cache_bytes

    def prefill(
        self,
        ids: Sequence[int],
        *,
        all_logits: bool = False,
        cancellation: Cancellation | None = None,
    ) -> Logits:
        """Append tokens; the logits after the last one, or after each.

        Shapes: [vocab_size], or with all_logits [len(ids), vocab_size].
        Errors: as `Engine.step`.
        """
        request = [(self, ids)]
        return self.engine.step(request, all_logits=all_logits, cancellation=cancellation)[0]

    def decode(self, token_id: int) -> Logits:
        """Append one token; the logits after it, [vocab_size]. Errors: as `Engine.step`."""
        return self.prefill([token_id])

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`; their pages are free again.

        Raises:
            SessionError: the session is closed, or does not hold as many tokens.
        """
        self.core.rewind(length)

    def rewind_to_prefix(self, ids: Sequence[int]) -> int:
        """Forget what differs from `ids`; how many tokens of them stay.

        For a prompt that starts as the one before did, such as the next turn of a conversation.

        Raises:
            SessionError: the session is closed.
        """
        same = self.common_prefix(ids)
        self.rewind(same)
        return same

    def common_prefix(self, ids: Sequence[int] | Integers) -> int:
        """How many tokens of `ids` the session holds at its start.

        Raises:
            SessionError: the session is closed.
        """
        return self.core.common_prefix(token_array(ids))

    def fill_by_copies(self, length: int) -> None:
        """Grow to `length` tokens without computing: whole pages of the cache are repeated.

        For measuring: reading this cache takes the time that reading a real one takes.

        Raises:
            SessionError: the session is closed, holds less than a page, or the cache is full.
        """
        self.core.fill_by_copies(length)

    def fork(self) -> Session:
        """Another session with the same tokens; takes no memory until one of them goes on.

        Raises:
            SessionError: the session is closed.
        """
        return Session(self.engine, self.core.fork())

    def save(self, path: Path | str) -> None:
        """Write the session to a file that `Engine.load_session` reads.

        The file appears whole or not at all. It holds the tokens and their cache, for this bundle
        alone, unencrypted.

        Raises:
            SessionError: the session is closed, or a generation is under way on it.
            OutputError: the file cannot be written.
        """
        self.core.save(os.fsencode(path))

    def close(self) -> None:
        """Give the memory back, once calls in other threads have ended. May be called again."""
        self._core = None
