"""Sessions under random sequences of calls, against a list of tokens a session."""

from __future__ import annotations

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
    """Every logit is checked, and so is every page: none lost, none used by two writers."""

    engine: Engine
    toy_logits: object
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[Session, list[int]] = {}

    def check(self, session: Session, logits: object) -> None:
        np.testing.assert_array_equal(logits, type(self).toy_logits(self.tokens[session]))  # type: ignore[operator]

    def demand(self, session: Session, count: int) -> int:
        """Pages that appending takes, by the definition of pages."""
        length = session.length
        copied = length % 64 > 0 and self.users()[session.pages.pages[-1]] > 1
        return -(-(length + count) // 64) - -(-length // 64) + copied

    def users(self) -> dict[int, int]:
        count: dict[int, int] = {}
        for session in self.tokens:
            for page in session.pages.pages:
                count[page] = count.get(page, 0) + 1
        return count

    @property
    def free(self) -> int:
        return PAGES - len(self.users())

    @rule(target=sessions)
    def make(self) -> Session:
        session = self.engine.session()
        self.tokens[session] = []
        return session

    @rule(session=sessions, ids=TOKENS)
    def append(self, session: Session, ids: list[int]) -> None:
        if self.demand(session, len(ids)) > self.free:
            with pytest.raises(SessionError, match="full"):
                session.prefill(ids)
            return
        logits = session.prefill(ids)
        self.tokens[session] += ids
        self.check(session, logits)

    @rule(a=sessions, b=sessions, ids=TOKENS, token=st.integers(0, 255))
    def append_together(self, a: Session, b: Session, ids: list[int], token: int) -> None:
        if a is b:
            return
        # Two that share their last page need one copy, not two.
        shared = (
            a.length % 64 > 0
            and a.length == b.length
            and a.pages.pages[-1] == b.pages.pages[-1]
            and self.users()[a.pages.pages[-1]] == 2
        )
        if self.demand(a, len(ids)) + self.demand(b, 1) - shared > self.free:
            with pytest.raises(SessionError, match="full"):
                self.engine.step([(a, ids), (b, [token])])
            return
        logits = self.engine.step([(a, ids), (b, [token])])
        self.tokens[a] += ids
        self.tokens[b] += [token]
        self.check(a, logits[0])
        self.check(b, logits[1])

    @rule(session=sessions, part=st.floats(0, 1))
    def rewind(self, session: Session, part: float) -> None:
        length = int(part * session.length)
        session.rewind(length)
        del self.tokens[session][length:]

    @rule(target=sessions, session=sessions)
    def fork(self, session: Session) -> Session:
        fork = session.fork()
        self.tokens[fork] = list(self.tokens[session])
        return fork

    @rule(session=consumes(sessions))
    def close(self, session: Session) -> None:
        session.close()
        del self.tokens[session]

    @invariant()
    def sessions_hold_their_tokens(self) -> None:
        for session, tokens in self.tokens.items():
            assert session.tokens == tuple(tokens)

    @invariant()
    def pages_are_neither_lost_nor_used_twice(self) -> None:
        assert self.engine._arena.free_pages == self.free
        assert 0 not in self.users()

    def teardown(self) -> None:
        for session in self.tokens:
            session.close()


def test_sessions_keep_their_tokens_whatever_is_called(toy) -> None:  # type: ignore[no-untyped-def]
    class Here(Sessions):
        engine = toy.load(max_tokens=64 * PAGES, prefill_chunk=48)
        toy_logits = staticmethod(toy.logits)

    run_state_machine_as_test(Here, settings=settings(max_examples=60, deadline=None))
