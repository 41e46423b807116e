"""Sessions of the C++ engine, held against the toy model of conftest.py."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cpp.core_abi import AbiError, Api, SessionHandle, load_api
from cpp.cuda_double import CudaApi
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


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def api(request: pytest.FixtureRequest) -> Api:
    """With the cache in memory of the host, and on the GPU of `cuda_double`."""
    api = load_api()
    return api if request.param == "cpu" else CudaApi(api.path)


@pytest.fixture(scope="module")
def engine(api: Api, toy: Any) -> Any:
    return api.engine(toy.path)


def random_ids(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 256, count).tolist()
    return ids


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 512])
def test_a_prompt_gives_the_same_however_it_is_cut(
    api: Api, toy: Any, length: int, chunk: int
) -> None:
    ids = random_ids(length)
    engine = api.engine(toy.path, prefill_chunk=chunk)
    session = engine.session()
    (logits,) = engine.step([(session, ids)], positions=[range(length)])
    for at, row in enumerate(logits):
        np.testing.assert_array_equal(row, toy.logits(ids[: at + 1]), f"after token {at}")
    assert session.tokens == ids
    session.destroy()


def test_decoding_continues_over_page_edges(toy: Any, engine: Any) -> None:
    ids = random_ids(50)
    session = engine.session()
    session.prefill(ids)
    for token in random_ids(150, seed=1):
        ids.append(token)
        np.testing.assert_array_equal(session.decode(token), toy.logits(ids))
    assert session.tokens == ids
    session.destroy()


def test_sessions_of_different_lengths_share_a_step(toy: Any, engine: Any) -> None:
    """A batch with ragged pasts and ragged news is what each session is alone."""
    pasts, news = (0, 64, 100, 3, 191), (5, 1, 64, 130, 1)
    sessions = [engine.session() for _ in pasts]
    held = [random_ids(past, seed=index) for index, past in enumerate(pasts)]
    for session, ids in zip(sessions, held, strict=True):
        if ids:
            session.prefill(ids)
    added = [random_ids(new, seed=100 + index) for index, new in enumerate(news)]
    results = engine.step(list(zip(sessions, added, strict=True)))
    for old, new, logits in zip(held, added, results, strict=True):
        np.testing.assert_array_equal(logits, toy.logits(old + new))
    # and again, so that what the padded tokens wrote would show
    for old, new, logits in zip(
        held, added, engine.step([(s, [7]) for s in sessions]), strict=True
    ):
        np.testing.assert_array_equal(logits, toy.logits([*old, *new, 7]))
    for session in sessions:
        session.destroy()


def test_logits_come_for_the_positions_asked_for(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, prefill_chunk=16)
    ids = [random_ids(40), random_ids(9, seed=1), random_ids(3, seed=2)]
    wanted = [[0, 39, 17], [], [2, 2]]
    sessions = [engine.session() for _ in ids]
    results = engine.step(list(zip(sessions, ids, strict=True)), positions=wanted)
    for row, at, logits in zip(ids, wanted, results, strict=True):
        assert logits.shape == (len(at), 263)
        for position, line in zip(at, logits, strict=True):
            np.testing.assert_array_equal(line, toy.logits(row[: position + 1]))


def test_forks_share_the_past_and_nothing_after(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=64 * 10)
    ids = random_ids(100)
    session = engine.session()
    session.prefill(ids)
    sessions = [session, *(session.fork() for _ in range(5))]
    assert engine.info.free_tokens == 64 * 8, "forks take no page by themselves"
    for index, logits in enumerate(engine.step([(s, [i]) for i, s in enumerate(sessions)])):
        np.testing.assert_array_equal(logits, toy.logits([*ids, index]))
    assert engine.info.free_tokens == 64 * 3, "the full page is still shared"
    session.destroy()
    for index, one in enumerate(sessions[1:], 1):
        np.testing.assert_array_equal(one.decode(5), toy.logits([*ids, index, 5]))
    for one in sessions[1:]:
        one.destroy()
    assert engine.info.free_tokens == 64 * 10


def test_a_full_cache_says_how_many_tokens_fit_and_keeps_the_session(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=128)
    session, other = engine.session(), engine.session()
    ids = random_ids(70)
    session.prefill(ids)
    assert (session.info.room, other.info.room) == (58, 0)
    with pytest.raises(AbiError, match="CACHE_FULL: the cache is full") as caught:
        session.prefill(random_ids(59))
    assert "59 new tokens" in caught.value.text
    assert "58 for this session" in caught.value.text
    assert "max_tokens above 128" in caught.value.text
    with pytest.raises(AbiError, match="0 for this session"):
        other.prefill([1])
    with pytest.raises(AbiError, match="CACHE_FULL"):
        engine.step([(session, [1]), (other, [1])])
    assert session.tokens == ids
    np.testing.assert_array_equal(session.prefill(ids[:58]), toy.logits(ids + ids[:58]))
    session.rewind(10)
    np.testing.assert_array_equal(other.prefill([3]), toy.logits([3]))
    np.testing.assert_array_equal(session.decode(9), toy.logits([*ids[:10], 9]))


def test_a_copy_needs_a_page_too(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=64)
    session = engine.session()
    session.prefill([1, 2, 3])
    fork = session.fork()
    assert session.info.room == fork.info.room == 0
    with pytest.raises(AbiError, match="0 for this session"):
        fork.decode(1)
    session.destroy()
    assert fork.info.room == 61
    np.testing.assert_array_equal(fork.decode(4), toy.logits([1, 2, 3, 4]))


def test_the_context_is_a_limit(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=4096)
    session = engine.session()
    ids = random_ids(995)
    session.prefill(ids)
    with pytest.raises(AbiError, match="CONTEXT_FULL") as caught:
        session.prefill([1] * 6)
    assert "995 tokens in the session and 6 new ones" in caught.value.text
    assert "1000 together" in caught.value.text
    assert session.info.room == 5
    np.testing.assert_array_equal(session.prefill([1] * 5), toy.logits([*ids, *[1] * 5]))


def test_a_cancelled_step_leaves_the_sessions_as_they_were(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=10_000, prefill_chunk=1)
    sessions = [engine.session() for _ in range(8)]
    for session in sessions:
        session.prefill([5, 6])
    requests = [(session, random_ids(900)) for session in sessions]  # some 200 ms
    cancellation = api.make("mla_cancellation_create")
    timer = threading.Timer(0.01, api.call, ("mla_cancellation_request", cancellation))
    timer.start()
    with pytest.raises(AbiError, match="CANCELLED"):
        engine.step(requests, cancellation=cancellation)
    timer.join()
    for session in sessions:
        assert session.tokens == [5, 6]
        np.testing.assert_array_equal(session.decode(9), toy.logits([5, 6, 9]))
    with pytest.raises(AbiError, match="CANCELLED"):  # a raised flag stays raised
        engine.step([(sessions[0], [1])], cancellation=cancellation)
    api.call("mla_cancellation_destroy", cancellation)
    engine.step([(sessions[0], [1])])


def test_threads_with_sessions_of_their_own(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(5):
                ids = random_ids(100 + seed, seed=seed + turn)
                session = engine.session()
                session.prefill(ids)
                fork = session.fork()
                for token in range(20):
                    ids.append(token)
                    np.testing.assert_array_equal(session.decode(token), toy.logits(ids))
                session.destroy()
                np.testing.assert_array_equal(fork.decode(1), toy.logits([*ids[:-20], 1]))
                fork.destroy()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert engine.info.free_tokens == engine.info.capacity_tokens


def test_threads_are_served_in_turn(api: Api, toy: Any) -> None:
    """Nobody gets most of the steps by being the one who has just had one."""
    engine = api.engine(toy.path, max_tokens=2048)
    done = [0, 0]
    end = threading.Event()

    def work(index: int) -> None:
        session = engine.session()
        while not end.is_set() and session.length < 900:
            session.decode(1)
            done[index] += 1
        session.destroy()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    end.wait(0.5)
    end.set()
    for thread in threads:
        thread.join()
    assert min(done) > max(done) / 4, done


# ---- any sequence of calls

PAGES = 7
TOKENS = st.lists(st.integers(0, 255), min_size=1, max_size=150)


class Sessions(RuleBasedStateMachine):
    """Every logit is checked, and that no page is lost."""

    engine: Any
    toy_logits: Any
    folder: Any
    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[SessionHandle, list[int]] = {}

    def append_or_fail(self, requests: list[tuple[SessionHandle, list[int]]]) -> bool:
        try:
            results = self.engine.step(requests)
        except AbiError as error:
            assert error.status == "CACHE_FULL"  # noqa: PT017
            return False
        for (session, ids), logits in zip(requests, results, strict=True):
            self.tokens[session] += ids
            np.testing.assert_array_equal(logits, self.toy_logits(self.tokens[session]))
        return True

    @rule(target=sessions)
    def make(self) -> SessionHandle:
        session = self.engine.session()
        self.tokens[session] = []
        return session

    @rule(session=sessions, ids=TOKENS)
    def append(self, session: SessionHandle, ids: list[int]) -> None:
        room = session.info.room
        assert self.append_or_fail([(session, ids)]) == (len(ids) <= room)

    @rule(a=sessions, b=sessions, ids=TOKENS, token=st.integers(0, 255))
    def append_together(
        self, a: SessionHandle, b: SessionHandle, ids: list[int], token: int
    ) -> None:
        if a is not b:
            self.append_or_fail([(a, ids), (b, [token])])

    @rule(session=sessions, part=st.floats(0, 1))
    def rewind(self, session: SessionHandle, part: float) -> None:
        length = int(part * session.length)
        session.rewind(length)
        del self.tokens[session][length:]

    @rule(target=sessions, session=sessions)
    def fork(self, session: SessionHandle) -> SessionHandle:
        fork = session.fork()
        self.tokens[fork] = list(self.tokens[session])
        return fork

    @rule(target=sessions, session=sessions)
    def save_and_load(self, session: SessionHandle) -> SessionHandle:
        session.save(self.folder / "session")
        try:
            loaded: SessionHandle = self.engine.load(self.folder / "session")
        except AbiError as error:
            assert error.status == "CACHE_FULL"  # noqa: PT017
            loaded = self.engine.session()
            self.tokens[loaded] = []
        else:
            self.tokens[loaded] = list(self.tokens[session])
        return loaded

    @rule(session=sessions, ids=TOKENS)
    def generate(self, session: SessionHandle, ids: list[int]) -> None:
        before = self.tokens[session]
        try:
            made = session.generate(ids, max_tokens=3, ignore_eos=1)
        except AbiError as error:
            assert error.status == "CACHE_FULL"  # noqa: PT017
            assert session.tokens == before
            return
        self.tokens[session] = [*ids, *made.tokens[:-1]]
        for at, token in enumerate(made.tokens):
            expected = self.toy_logits([*ids, *made.tokens[:at]])
            assert token == expected.argmax()

    @rule(session=consumes(sessions))
    def destroy(self, session: SessionHandle) -> None:
        session.destroy()
        del self.tokens[session]

    @invariant()
    def sessions_hold_their_tokens(self) -> None:
        for session, tokens in self.tokens.items():
            assert session.tokens == tokens

    def teardown(self) -> None:
        for session in self.tokens:
            session.destroy()
        assert self.engine.info.free_tokens == 64 * PAGES, "a page was lost"


def test_sessions_keep_their_tokens_whatever_is_called(api: Api, toy: Any, tmp_path: Any) -> None:
    class Here(Sessions):
        engine = api.engine(toy.path, max_tokens=64 * PAGES, prefill_chunk=48)
        toy_logits = staticmethod(toy.logits)
        folder = tmp_path

    run_state_machine_as_test(Here, settings=settings(max_examples=60, deadline=None))
