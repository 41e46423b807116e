"""Generation: the loop, its ends, and the text it shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime import Cancellation, Engine, GenerationOptions

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

EOS = 257
PROMPT = [72, 101, 108, 108, 111]


Scripted = Callable[[int, Sequence[int]], Engine]
"""Makes an engine that says the tokens after a prompt of the length."""


def test_greedy_tokens_are_the_most_likely_ones(toy: Toy, toy_engine: Engine) -> None:
    result = toy_engine.generate(PROMPT, GenerationOptions(max_tokens=200))
    assert list(result.tokens) == toy.greedy(PROMPT, len(result.tokens))
    assert result.finish_reason in ("length", "eos")
    assert result.statistics.generated_tokens == len(result.tokens)


def test_a_text_is_encoded_as_the_files_say(toy: Toy, toy_engine: Engine) -> None:
    result = toy_engine.generate("the", GenerationOptions(max_tokens=20))
    assert list(result.tokens) == toy.greedy([256, 258, ord("e")], len(result.tokens))
    empty = toy_engine.generate("", GenerationOptions(max_tokens=20))
    assert list(empty.tokens) == toy.greedy([256], len(empty.tokens))


def test_an_end_token_ends_the_text_and_is_not_in_it(
    scripted: Scripted,
) -> None:
    result = scripted(5, [65, 66, EOS, 67]).generate(PROMPT)
    assert result.tokens == (65, 66, EOS)
    assert (result.text, result.finish_reason) == ("AB", "eos")


def test_half_a_character_at_the_end_is_replaced(scripted: Scripted) -> None:
    assert scripted(5, [65, 0xE2, 0x82, EOS]).generate(PROMPT).text == "A\ufffd"


def test_a_stop_string_ends_the_text_before_it(scripted: Scripted) -> None:
    engine = scripted(5, [*b"one\n", 258, *b"e end"])  # 258 is "th"
    events = list(engine.stream(PROMPT, GenerationOptions(stop=("\nthe", "zzz"))))
    assert "".join(event.text for event in events) == "one"
    assert [event.finish_reason for event in events] == [None] * 5 + ["stop"]
    assert [event.text for event in events] == ["o", "n", "e", "", "", ""]


def test_text_held_back_for_a_stop_string_comes_at_the_end(scripted: Scripted) -> None:
    options = GenerationOptions(max_tokens=3, stop=("</s>",))
    result = scripted(5, list(b"ab<")).generate(PROMPT, options)
    assert (result.text, result.finish_reason) == ("ab<", "length")


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(
        st.one_of(st.integers(0, 262), st.sampled_from([*"é€😀".encode()])),
        min_size=1,
        max_size=40,
    ),
    stops=st.lists(st.sampled_from(["\ufffd", "é", "th", "aa", "€\ufffd"]), max_size=2),
)
def test_events_and_result_agree(scripted: Scripted, tokens: list[int], stops: list[str]) -> None:
    options = GenerationOptions(max_tokens=len(tokens), stop=tuple(stops))
    engine = scripted(5, tokens)
    generation = engine.stream(PROMPT, options)
    events = list(generation)
    result = generation.result
    assert "".join(event.text for event in events) == result.text
    assert tuple(event.token for event in events) == result.tokens
    assert result.tokens == tuple(tokens[: len(result.tokens)])
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == result.finish_reason
    if result.finish_reason != "stop":
        shown = result.tokens[:-1] if result.finish_reason == "eos" else result.tokens
        assert result.text == engine.tokenizer.decode(shown)
    assert not any(stop in result.text for stop in stops)


def test_the_models_context_ends_a_text(toy: Toy) -> None:
    engine = toy.load(max_tokens=2000)
    prompt = [1] * 995
    result = engine.generate(prompt, GenerationOptions(max_tokens=100))
    expected = toy.greedy(prompt, 6)
    assert EOS not in expected
    assert list(result.tokens) == expected, "the last one needs no place in the cache"
    assert result.finish_reason == "context"


def test_a_full_cache_ends_a_text(toy: Toy) -> None:
    engine = toy.load(max_tokens=128)
    with engine.session() as other:
        other.prefill([1])
        result = engine.generate([1] * 60, GenerationOptions(max_tokens=100))
        assert (len(result.tokens), result.finish_reason) == (5, "context")
        with pytest.raises(SessionError, match="full"):
            engine.generate([1] * 65)


def test_a_session_is_used_again_for_what_it_holds(toy: Toy) -> None:
    engine = toy.load()
    options = GenerationOptions(max_tokens=10)
    with engine.session() as session:
        first = engine.generate(PROMPT, options, session=session)
        assert session.tokens == (*PROMPT, *first.tokens[:-1])
        assert first.statistics.reused_tokens == 0
        turn = [*PROMPT, *first.tokens, 1, 2]
        second = engine.generate(turn, options, session=session)
        assert second.statistics.reused_tokens == len(turn) - 3
        assert list(second.tokens) == toy.greedy(turn, len(second.tokens))
        again = engine.generate(PROMPT, options, session=session)
        assert again.statistics.reused_tokens == len(PROMPT) - 1
        assert again.tokens == first.tokens
        other = engine.generate([72, 5, 6], options, session=session)
        assert other.statistics.reused_tokens == 1
        assert list(other.tokens) == toy.greedy([72, 5, 6], len(other.tokens))


def test_leaving_a_stream_frees_its_session(toy: Toy) -> None:
    engine = toy.load(max_tokens=128)
    with engine.stream([1] * 100) as generation:
        first = next(generation)
        assert engine.free_tokens == 0
    assert engine.free_tokens == 128
    assert generation.result.tokens == (first.token,)
    assert generation.result.finish_reason is None
    assert list(generation) == []

    next(engine.stream([1] * 100))  # dropped at once
    assert engine.free_tokens == 128
    engine.stream([1] * 100)  # never begun
    assert engine.free_tokens == 128


def test_a_stream_that_was_left_leaves_its_session_free(toy: Toy, toy_engine: Engine) -> None:
    with toy_engine.session() as session:
        left = toy_engine.stream(PROMPT, session=session)
        first = next(left).token
        again = toy_engine.generate(PROMPT, GenerationOptions(max_tokens=3), session=session)
        assert again.tokens[0] == first
        with pytest.raises(SessionError, match="was changed"):
            next(left)
        assert list(left) == []
        assert left.result.tokens == (first,)
        np.testing.assert_array_equal(
            session.decode(1), toy.logits([*PROMPT, *again.tokens[:-1], 1])
        )


def test_a_session_that_is_closed_ends_its_stream(toy_engine: Engine) -> None:
    session = toy_engine.session()
    stream = toy_engine.stream(PROMPT, session=session)
    next(stream)
    session.close()
    with pytest.raises(SessionError, match="closed"):
        next(stream)


def test_another_thread_cancels_a_generation(toy: Toy) -> None:
    engine = toy.load()
    cancellation = Cancellation()
    with engine.session() as session:
        events = []
        options = GenerationOptions(max_tokens=900)
        generation = engine.stream(PROMPT, options, session=session, cancellation=cancellation)
        for event in generation:
            events.append(event)
            if len(events) == 3:
                thread = threading.Thread(target=cancellation.request)
                thread.start()
                thread.join()
        result = generation.result
        assert [event.token for event in events] == toy.greedy(PROMPT, 3) == list(result.tokens)
        assert result.finish_reason == "cancelled"
        assert session.tokens == (*PROMPT, *result.tokens[:-1])
        late = engine.generate(PROMPT, session=session, cancellation=cancellation)
        assert (late.tokens, late.finish_reason) == ((), "cancelled")
        held = session.tokens
        np.testing.assert_array_equal(session.decode(7), toy.logits([*held, 7]))


def test_a_long_prompt_is_cancelled_between_chunks_too(toy: Toy) -> None:
    engine = toy.load(prefill_chunk=1)
    cancellation = Cancellation()
    threading.Timer(0.02, cancellation.request).start()
    result = engine.generate([5] * 999, cancellation=cancellation)
    assert (result.tokens, result.finish_reason) == ((), "cancelled")
    assert engine.free_tokens == engine.capacity_tokens


def test_a_seed_gives_the_same_text(toy_engine: Engine) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        options = GenerationOptions(max_tokens=30, temperature=50.0, seed=seed)
        return toy_engine.generate(PROMPT, options).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_the_repetition_penalty_knows_prompt_and_output(toy: Toy, toy_engine: Engine) -> None:
    result = toy_engine.generate(PROMPT, GenerationOptions(max_tokens=50, repetition_penalty=3))
    tokens = list(PROMPT)
    for token in result.tokens:
        logits = toy.logits(tokens)  # none is above 0
        logits[sorted(set(tokens))] *= 3
        assert token == logits.argmax()
        tokens.append(token)
    assert list(result.tokens) != toy.greedy(PROMPT, 50), "the penalty changed something"


def test_statistics_count_time_and_memory(toy_engine: Engine) -> None:
    statistics = toy_engine.generate(PROMPT, GenerationOptions(max_tokens=4)).statistics
    assert statistics.prompt_tokens == 5
    assert statistics.cache_bytes == 64 * 6
    assert statistics.prefill_tokens_per_s == pytest.approx(5 / statistics.prefill_seconds)
    assert statistics.decode_tokens_per_s == pytest.approx(
        (statistics.generated_tokens - 1) / statistics.decode_seconds
    )
    one = toy_engine.generate(PROMPT, GenerationOptions(max_tokens=1)).statistics
    assert one.decode_tokens_per_s is None


def test_time_between_events_is_not_counted(toy_engine: Engine) -> None:
    began, waited = time.perf_counter(), 0.0
    generation = toy_engine.stream(PROMPT, GenerationOptions(max_tokens=4))
    for _ in generation:
        paused = time.perf_counter()
        time.sleep(0.1)
        waited += time.perf_counter() - paused
    counted = generation.result.statistics.decode_seconds
    assert counted <= time.perf_counter() - began - waited


def test_a_bad_prompt_is_refused_before_the_first_event(toy_engine: Engine) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        toy_engine.stream([])
    with pytest.raises(UsageError, match="vocabulary"):
        toy_engine.stream([263])
    with pytest.raises(SessionError, match="context"):
        toy_engine.generate([1] * 1001)
