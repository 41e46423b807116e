"""What is kept of sequences that ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mla_deploy.runtime import Engine, Session
from mla_deploy.runtime.serve import prefix_cache
from mla_deploy.runtime.serve.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy


def session(engine: Engine, *tokens: int) -> Session:
    made = engine.session()
    made.prefill(tokens)
    return made


def test_the_longest_common_start_is_found_and_the_kept_session_stays_as_it_is(toy: Toy) -> None:
    engine = toy.load()
    cache = PrefixCache()
    cache.keep(session(engine, 1, 2, 3))
    kept = session(engine, 1, 2, 4, 5, 6)
    cache.keep(kept)
    found = cache.start([1, 2, 4, 5, 9])
    assert found is not None
    assert found.tokens == (1, 2, 4, 5)
    assert found.decode(9).tolist() == toy.logits([1, 2, 4, 5, 9]).tolist()
    assert kept.tokens == (1, 2, 4, 5, 6)
    assert cache.start([9]) is None
    assert PrefixCache().start([1]) is None


def test_the_one_used_longest_ago_goes_first(toy: Toy) -> None:
    cache = PrefixCache()
    engine = toy.load()
    sessions = [session(engine, token, 7) for token in (1, 2, 3)]
    for one in sessions:
        cache.keep(one)
    assert cache.start([1, 8]) is not None
    assert cache.evict()
    assert [one.closed for one in sessions] == [False, True, False]
    assert cache.evict()
    assert [one.closed for one in sessions] == [False, True, True]
    assert cache.evict()
    assert not cache.evict()
    assert engine.free_tokens == engine.capacity_tokens


def test_of_a_session_and_its_continuation_only_the_longer_is_kept(toy: Toy) -> None:
    engine = toy.load()
    cache = PrefixCache()
    short, long = session(engine, 1, 2), session(engine, 1, 2, 3)
    cache.keep(short)
    cache.keep(long)
    assert (short.closed, long.closed, len(cache)) == (True, False, 1)
    again = session(engine, 1, 2)
    cache.keep(again)
    assert (again.closed, long.closed, len(cache)) == (True, False, 1)
    cache.keep(engine.session())
    assert len(cache) == 1


def test_their_number_is_bounded(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MOST", 2)
    engine = toy.load()
    cache = PrefixCache()
    for token in range(4):
        cache.keep(session(engine, token))
    assert len(cache) == 2
    assert cache.start([0, 9]) is None
    assert cache.start([3, 9]) is not None
    cache.clear()
    assert len(cache) == 0
    assert engine.free_tokens == engine.capacity_tokens
