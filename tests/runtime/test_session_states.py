"""Sessions under random sequences of calls, against lists of tokens and of pages.

Every logit is checked, so that no page is used by two writers; and after every call what the
sessions hold and what is free, so that none is lost, shared too long or copied too early.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mla_deploy.errors import SessionError
from mla_deploy.runtime import Engine, Session

PAGES = 7
TOKENS = st.lists(st.integers(0, 255), min_size=1, max_size=150)


class Sessions(RuleBasedStateMachine):
    """The engine beside a model of it: `pages` holds names of pages, which forks share."""

    engine: Engine
    toy_logits: object
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[Session, list[int]] = {}
        self.pages: dict[Session, list[int]] = {}
        self.names = itertools.count()

    def check(self, session: Session, logits: object) -> None:
        np.testing.assert_array_equal(logits, type(self).toy_logits(self.tokens[session]))  # type: ignore[operator]

    @property
    def free(self) -> int:
        return PAGES - len(set().union(*self.pages.values()))

    def is_shared(self, page: int) -> bool:
        return sum(page in pages for pages in self.pages.values()) > 1

    def grow(self, session: Session, count: int) -> bool:
        """Take the pages for more tokens, in the model alone; False: there are not enough."""
        pages, length = self.pages[session], len(self.tokens[session])
        copied = length % 64 > 0 and self.is_shared(pages[-1])
        more = -(-(length + count) // 64) - len(pages)
        if more + copied > self.free:
            return False
        self.pages[session] = pages[: len(pages) - copied] + [
            next(self.names) for _ in range(more + copied)
        ]
        return True

    def append_all(self, requests: list[tuple[Session, list[int]]]) -> None:
        before = dict(self.pages)
        if not all(self.grow(session, len(ids)) for session, ids in requests):
            self.pages = before
            with pytest.raises(SessionError, match="full"):
                self.engine.step(requests)
            return
        for (session, ids), logits in zip(requests, self.engine.step(requests), strict=True):
            self.tokens[session] += ids
            self.check(session, logits)

    @rule(target=sessions)
    def make(self) -> Session:
        session = self.engine.session()
        self.tokens[session], self.pages[session] = [], []
        return session

    @rule(session=sessions, ids=TOKENS)
    def append(self, session: Session, ids: list[int]) -> None:
        self.append_all([(session, ids)])

    @rule(a=sessions, b=sessions, ids=TOKENS, token=st.integers(0, 255))
    def append_together(self, a: Session, b: Session, ids: list[int], token: int) -> None:
        if a is not b:
            self.append_all([(a, ids), (b, [token])])

    @rule(session=sessions, part=st.floats(0, 1))
    def rewind(self, session: Session, part: float) -> None:
        length = int(part * session.length)
        session.rewind(length)
        del self.tokens[session][length:]
        self.pages[session] = self.pages[session][: -(-length // 64)]

    @rule(target=sessions, session=sessions)
    def fork(self, session: Session) -> Session:
        fork = session.fork()
        self.tokens[fork] = list(self.tokens[session])
        self.pages[fork] = self.pages[session]
        return fork

    @rule(session=consumes(sessions))
    def close(self, session: Session) -> None:
        session.close()
        del self.tokens[session], self.pages[session]

    @invariant()
    def sessions_hold_their_tokens(self) -> None:
        for session, tokens in self.tokens.items():
            assert session.tokens == tuple(tokens)

    @invariant()
    def pages_are_neither_lost_nor_used_twice(self) -> None:
        assert self.engine.free_tokens == 64 * self.free
        for session, pages in self.pages.items():
            assert session.cache_bytes == 64 * 6 * len(pages)

    def teardown(self) -> None:
        for session in self.tokens:
            session.close()


def test_sessions_keep_their_tokens_whatever_is_called(toy) -> None:  # type: ignore[no-untyped-def]
    class Here(Sessions):
        engine = toy.load(max_tokens=64 * PAGES, prefill_chunk=48)
        toy_logits = staticmethod(toy.logits)

    run_state_machine_as_test(Here, settings=settings(max_examples=60, deadline=None))
