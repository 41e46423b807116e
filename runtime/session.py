"""A sequence of tokens in the cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from mla_deploy.errors import SessionError
from mla_deploy.runtime.arena import ArenaFullError, PageTable
from mla_deploy.runtime.graph import Logits

if TYPE_CHECKING:
    from mla_deploy.runtime.engine import Engine


class Session:
    """One sequence: made by `Engine.session`, closed by `close` or at the end of a `with`.

    After an error a session holds the tokens it held before the call, and goes on working.
    """

    def __init__(self, engine: Engine, pages: PageTable, tokens: Sequence[int] = ()) -> None:
        """Use `Engine.session` or `fork`.

        Args:
            pages: for the engine; holds room for `tokens`.
        """
        self.engine = engine
        self.pages = pages
        self._tokens = list(tokens)
        self._closed = False
        # A forgotten session must not keep its pages.
        weakref.finalize(self, pages.abandon).atexit = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return tuple(self._tokens)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def room(self) -> int:
        """Tokens that can be added now: the model's context and the free pages allow so many."""
        with self.engine.lock:
            left = self.engine.bundle.manifest.model.max_position_embeddings - self.length
            return max(0, min(left, self.pages.room(self.length)))

    @property
    def cache_bytes(self) -> int:
        """Bytes of this session's pages, those shared with forks included."""
        return self.pages.cache_bytes

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        """Append tokens; the logits after the last one, or after each.

        Shapes: [vocab_size], or with all_logits [len(ids), vocab_size].
        Errors: as `Engine.step`.
        """
        return self.engine.step([(self, ids)], all_logits=all_logits)[0]

    def decode(self, token_id: int) -> Logits:
        """Append one token; the logits after it, [vocab_size]. Errors: as `Engine.step`."""
        return self.prefill([token_id])

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`; their pages are free again.

        Raises:
            SessionError: the session is closed, or does not hold as many tokens.
        """
        self.check_open()
        if not 0 <= length <= self.length:
            raise SessionError(
                "a session cannot be rewound to there", found=length, allowed=f"0 to {self.length}"
            )
        with self.engine.lock:
            self.pages.truncate(length)
            del self._tokens[length:]

    def rewind_to_prefix(self, ids: Sequence[int]) -> int:
        """Forget what differs from `ids`; how many tokens of them stay.

        For a prompt that starts as the one before did, such as the next turn of a conversation.

        Raises:
            SessionError: the session is closed.
        """
        same = 0
        for held, wanted in zip(self._tokens, ids, strict=False):
            if held != wanted:
                break
            same += 1
        self.rewind(same)
        return same

    def fill_by_copies(self, length: int) -> None:
        """Grow to `length` tokens without computing: whole pages of the cache are repeated.

        For measuring: reading this cache takes the time that reading a real one takes.

        Raises:
            SessionError: the session is closed, holds less than a page, or the cache is full.
        """
        self.check_open()
        with self.engine.lock:
            page_tokens = self.engine.bundle.manifest.cache.page_tokens
            whole = self.length // page_tokens * page_tokens
            if self.length < length and not whole:
                raise SessionError(
                    "there is no whole page to copy",
                    found=f"{self.length} tokens",
                    allowed=f"{page_tokens} or more",
                    hint="prefill more tokens first",
                )
            if self.length >= length:
                return
            self.rewind(whole)
            try:
                self.pages.extend_by_copies(length)
            except ArenaFullError:
                raise SessionError(
                    "the cache is full", found=f"{length} tokens", allowed=f"{whole + self.room}"
                ) from None
            repeats = -(-length // whole)
            self._tokens = (self._tokens * repeats)[:length]

    def fork(self) -> Session:
        """Another session with the same tokens; takes no memory until one of them goes on.

        Raises:
            SessionError: the session is closed.
        """
        self.check_open()
        with self.engine.lock:
            return Session(self.engine, self.pages.fork(), self._tokens)

    def close(self) -> None:
        """Give the memory back. Closing again does nothing."""
        if not self._closed:
            self.rewind(0)
            self._closed = True

    def check_open(self) -> None:
        """Raise a SessionError if the session is closed."""
        if self._closed:
            raise SessionError("the session is closed", hint="make another with Engine.session()")

    def appended(self, ids: Sequence[int]) -> None:
        """For the engine: note tokens whose cache was written."""
        self._tokens += ids
