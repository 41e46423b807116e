"""Generation in C++: stopping, reuse of the session, cancellation, what a callback may do."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cpp.core_abi import AbiError, Api, load_api

from mla_deploy.runtime import GenerationOptions

PROMPT = [10, 20, 30]


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api()


@pytest.fixture(scope="module")
def engine(api: Api, toy: Any) -> Any:
    return api.engine(toy.path)


@pytest.fixture
def session(engine: Any) -> Any:
    session = engine.session()
    yield session
    session.destroy()


def test_greedy_tokens_are_the_most_likely(toy: Any, session: Any) -> None:
    made = session.generate(PROMPT, max_tokens=40, ignore_eos=1)
    assert made.tokens == toy.greedy(PROMPT, 40)
    assert made.finish_reason == "length"
    statistics = made.statistics
    assert (statistics.prompt_tokens, statistics.reused_tokens, statistics.token_count) == (
        3,
        0,
        40,
    )
    assert statistics.prefill_ms > 0
    assert statistics.decode_ms > 0
    assert statistics.cache_bytes == 64 * session.engine.info.bytes_per_token
    assert session.tokens == [*PROMPT, *made.tokens[:-1]]


@pytest.mark.parametrize(
    "choices",
    [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": 4},
        {"temperature": 1.5, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5},
        {"repetition_penalty": 1.3},
    ],
)
def test_a_generation_is_the_same_through_python(
    toy_engine: Any, session: Any, choices: dict[str, Any]
) -> None:
    made = session.generate(PROMPT, max_tokens=60, **choices)
    expected = toy_engine.generate(PROMPT, GenerationOptions(max_tokens=60, **choices))
    assert made.tokens == list(expected.tokens)
    assert made.finish_reason == expected.finish_reason


def test_the_end_token_ends_it(api: Api, own_toy: Any) -> None:
    third = own_toy.greedy(PROMPT, 3)[2]
    path = own_toy.path / "manifest.json"
    path.write_text(path.read_text().replace("257\n", f"{third}\n"))
    session = api.engine(own_toy.path).session()
    made = session.generate(PROMPT)
    assert (len(made.tokens), made.finish_reason) == (3, "eos")
    made = session.generate(PROMPT, max_tokens=10, ignore_eos=1)
    assert (len(made.tokens), made.finish_reason) == (10, "length")
    made = session.generate(PROMPT, stop_tokens=[1, third], ignore_eos=1)
    assert (len(made.tokens), made.finish_reason) == (3, "stop")


def test_a_full_context_or_cache_ends_it(api: Api, toy: Any) -> None:
    session = api.engine(toy.path, max_tokens=64).session()
    made = session.generate(PROMPT, ignore_eos=1)
    # 64 in the cache, and the last one sampled
    assert (len(made.tokens), made.finish_reason) == (62, "context")
    session = api.engine(toy.path, max_tokens=2000).session()
    made = session.generate([1] * 995, ignore_eos=1)
    assert (len(made.tokens), made.finish_reason) == (6, "context")


def test_a_prompt_that_does_not_fit_changes_nothing(api: Api, toy: Any) -> None:
    session = api.engine(toy.path, max_tokens=128, prefill_chunk=16).session()
    session.prefill([1, 2, 3, 4])
    with pytest.raises(AbiError, match="CACHE_FULL") as caught:
        session.generate([1, 2, *[7] * 130])
    assert "130 new tokens" in caught.value.text
    assert "126 for this session" in caught.value.text
    with pytest.raises(AbiError, match="CONTEXT_FULL"):
        session.generate([1, 2, *[7] * 999])
    assert session.tokens == [1, 2, 3, 4]
    np.testing.assert_array_equal(session.decode(5), toy.logits([1, 2, 3, 4, 5]))


def test_a_session_is_used_again_for_what_it_holds(toy: Any, session: Any) -> None:
    first = session.generate(PROMPT, max_tokens=5, ignore_eos=1)
    longer = [*PROMPT, *first.tokens, 9]
    second = session.generate(longer, max_tokens=5, ignore_eos=1)
    assert second.statistics.reused_tokens == len(PROMPT) + 4
    assert second.tokens == toy.greedy(longer, 5)
    third = session.generate(PROMPT, max_tokens=5, ignore_eos=1)  # all there, but for the logits
    assert third.statistics.reused_tokens == len(PROMPT) - 1
    assert third.tokens == first.tokens


def test_the_callback_sees_every_token_and_can_stop(toy: Any, session: Any) -> None:
    seen: list[int] = []
    made = session.generate(
        PROMPT, ignore_eos=1, callback=lambda token: seen.append(token) or len(seen) == 7
    )
    assert made.finish_reason == "callback"
    assert made.tokens == seen == toy.greedy(PROMPT, 7)
    assert session.tokens == [*PROMPT, *seen[:-1]]


def test_the_callback_may_fork_but_not_change_the_session(
    toy: Any, engine: Any, session: Any, tmp_path: Any
) -> None:
    forks, statuses = [], []

    def look(token: int) -> bool:
        forks.append(session.fork())
        assert session.length == 3 + len(forks) - 1
        for call in (
            lambda: session.decode(1),
            lambda: session.rewind(0),
            lambda: session.generate([1]),
            lambda: session.save(tmp_path / "session"),
            lambda: engine.step([(forks[-1], [1]), (session, [1])]),
        ):
            try:
                call()
            except AbiError as error:
                statuses.append(error.status)
        return False

    made = session.generate(PROMPT, max_tokens=4, ignore_eos=1, callback=look)
    assert statuses == ["BUSY"] * 5 * 4
    assert made.tokens == toy.greedy(PROMPT, 4)
    for count, fork in enumerate(forks):
        held = [*PROMPT, *made.tokens[:count]]
        np.testing.assert_array_equal(fork.decode(5), toy.logits([*held, 5]))
        fork.destroy()


def test_a_session_may_be_destroyed_while_it_generates(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path)
    session = engine.session()
    seen: list[int] = []

    def destroy(token: int) -> bool:
        if not seen:
            session.destroy()
            engine.close()
        seen.append(token)
        return False

    made = session.generate(PROMPT, max_tokens=5, ignore_eos=1, callback=destroy)
    assert made.tokens == seen == toy.greedy(PROMPT, 5)
    with pytest.raises(AbiError, match="INVALID_HANDLE"):
        session.decode(1)


def test_another_thread_cancels_it(api: Api, toy: Any, session: Any) -> None:
    cancellation = api.make("mla_cancellation_create")
    begun, results = threading.Event(), []

    def tell(_: int) -> bool:
        begun.set()
        return False

    def generate() -> None:
        results.append(
            session.generate(
                PROMPT, max_tokens=900, ignore_eos=1, callback=tell, cancellation=cancellation
            )
        )

    thread = threading.Thread(target=generate)
    thread.start()
    assert begun.wait(10)
    api.call("mla_cancellation_request", cancellation)
    thread.join(10)
    assert not thread.is_alive()
    (made,) = results
    assert made.finish_reason == "cancelled"
    assert 0 < len(made.tokens) < 900
    assert made.tokens == toy.greedy(PROMPT, len(made.tokens))
    held = session.tokens
    assert held == [*PROMPT, *made.tokens][: len(held)]
    np.testing.assert_array_equal(session.decode(5), toy.logits([*held, 5]))
    api.call("mla_cancellation_destroy", cancellation)


def test_a_prefill_is_cancelled_too_and_its_part_is_kept(api: Api, toy: Any) -> None:
    session = api.engine(toy.path, prefill_chunk=1).session()
    cancellation = api.make("mla_cancellation_create")

    def cancel() -> None:
        while session.length == 0:  # served between two chunks
            pass
        api.call("mla_cancellation_request", cancellation)

    thread = threading.Thread(target=cancel)
    thread.start()
    made = session.generate([3] * 950, cancellation=cancellation)
    thread.join()
    assert (made.finish_reason, made.tokens) == ("cancelled", [])
    length = session.length
    assert 0 < length < 950
    np.testing.assert_array_equal(session.decode(5), toy.logits([*[3] * length, 5]))
    made = session.generate([3] * 950, cancellation=cancellation)  # it stays raised
    assert (made.finish_reason, made.tokens) == ("cancelled", [])


def test_generations_of_several_threads_do_not_mix(api: Api, toy: Any) -> None:
    engine = api.engine(toy.path, max_tokens=4000, prefill_chunk=32)
    prompts = [[index + 1] * (50 + 40 * index) for index in range(4)]
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        session = engine.session()
        results[index] = session.generate(prompts[index], max_tokens=60, ignore_eos=1).tokens
        session.destroy()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(prompts):
        assert results[index] == toy.greedy(prompt, 60)
