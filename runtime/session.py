"""A sequence of tokens in the cache."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mla_deploy.runtime.cancellation import Cancellation
from mla_deploy.runtime.closing import Closing
from mla_deploy.runtime.native import Integers, Logits

if TYPE_CHECKING:
    from mla_deploy.runtime.engine import Engine


class Session(Closing):
    """One sequence: made by `Engine.session`, closed by `close` or at the end of a `with`.

    After an error a session holds the tokens it held before the call, and goes on working. Threads
    may share one; what they do to it then comes in any order.
    """

    engine: Engine

    @abc.abstractmethod
    def check_open(self) -> None:
        """Raise a SessionError if the session is closed."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens in the cache."""

    @property
    @abc.abstractmethod
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the cache."""

    @property
    @abc.abstractmethod
    def closed(self) -> bool:
        """Whether `close` was called."""

    @property
    @abc.abstractmethod
    def room(self) -> int:
        """Tokens that can be added now: the model's context and the free pages allow so many."""

    @property
    @abc.abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of this session's pages, those shared with forks included."""

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

    @abc.abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`; their pages are free again.

        Raises:
            SessionError: the session is closed, or does not hold as many tokens.
        """

    def rewind_to_prefix(self, ids: Sequence[int]) -> int:
        """Forget what differs from `ids`; how many tokens of them stay.

        For a prompt that starts as the one before did, such as the next turn of a conversation.

        Raises:
            SessionError: the session is closed.
        """
        same = self.common_prefix(ids)
        self.rewind(same)
        return same

    @abc.abstractmethod
    def common_prefix(self, ids: Sequence[int] | Integers) -> int:
        """How many tokens of `ids` the session holds at its start.

        Raises:
            SessionError: the session is closed.
        """

    @abc.abstractmethod
    def fill_by_copies(self, length: int) -> None:
        """Grow to `length` tokens without computing: whole pages of the cache are repeated.

        For measuring: reading this cache takes the time that reading a real one takes.

        Raises:
            SessionError: the session is closed, holds less than a page, or the cache is full.
        """

    @abc.abstractmethod
    def fork(self) -> Session:
        """Another session with the same tokens; takes no memory until one of them goes on.

        Raises:
            SessionError: the session is closed, or the engine holds one session at a time.
        """

    @abc.abstractmethod
    def save(self, path: Path | str) -> None:
        """Write the session to a file that `Engine.load_session` reads.

        The file appears whole or not at all. It holds the tokens and their cache, for this bundle
        alone, unencrypted.

        Raises:
            SessionError: the session is closed, a generation is under way on it, or the engine
                knows no such files (`Engine.saves_sessions`).
            OutputError: the file cannot be written.
        """
