"""Generation: the loop, its ends, and the text it shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime import Engine, GenerationOptions

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

EOS = 257
PROMPT = [72, 101, 108, 108, 111]


def forced(engine: Engine, tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sampler pick these tokens, one after another."""
    left = iter(tokens)
    monkeypatch.setattr("mla_deploy.runtime.generation.Sampler.pick", lambda *_: next(left))


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
    toy_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(toy_engine, [65, 66, EOS, 67], monkeypatch)
    result = toy_engine.generate(PROMPT)
    assert result.tokens == (65, 66, EOS)
    assert (result.text, result.finish_reason) == ("AB", "eos")


def test_half_a_character_at_the_end_is_replaced(
    toy_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(toy_engine, [65, 0xE2, 0x82, EOS], monkeypatch)
    assert toy_engine.generate(PROMPT).text == "A\ufffd"


def test_a_stop_string_ends_the_text_before_it(
    toy_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [*b"one\n", 258, *b"e end"]  # 258 is "th"
    forced(toy_engine, tokens, monkeypatch)
    events = list(toy_engine.stream(PROMPT, GenerationOptions(stop=("\nthe", "zzz"))))
    assert "".join(event.text for event in events) == "one"
    assert [event.finish_reason for event in events] == [None] * 5 + ["stop"]
    assert [event.text for event in events] == ["o", "n", "e", "", "", ""]


def test_text_held_back_for_a_stop_string_comes_at_the_end(
    toy_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(toy_engine, list(b"ab<"), monkeypatch)
    result = toy_engine.generate(PROMPT, GenerationOptions(max_tokens=3, stop=("</s>",)))
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
def test_events_and_result_agree(toy_engine: Engine, tokens: list[int], stops: list[str]) -> None:
    options = GenerationOptions(max_tokens=len(tokens), stop=tuple(stops))
    with pytest.MonkeyPatch.context() as patch:
        forced(toy_engine, tokens, patch)
        generation = toy_engine.stream(PROMPT, options)
        events = list(generation)
    result = generation.result
    assert "".join(event.text for event in events) == result.text
    assert tuple(event.token for event in events) == result.tokens
    assert result.tokens == tuple(tokens[: len(result.tokens)])
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == result.finish_reason
    if result.finish_reason != "stop":
        shown = result.tokens[:-1] if result.finish_reason == "eos" else result.tokens
        assert result.text == toy_engine.tokenizer.decode(shown)
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
        assert engine._arena.free_pages == 0
    assert engine._arena.free_pages == 2
    assert generation.result.tokens == (first.token,)
    assert generation.result.finish_reason is None
    assert list(generation) == []

    next(engine.stream([1] * 100))  # dropped at once
    assert engine._arena.free_pages == 2
    engine.stream([1] * 100)  # never begun
    assert engine._arena.free_pages == 2


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
    generation = toy_engine.stream(PROMPT, GenerationOptions(max_tokens=4))
    for _ in generation:
        time.sleep(0.1)
    assert generation.result.statistics.decode_seconds < 0.1


def test_a_bad_prompt_is_refused_before_the_first_event(toy_engine: Engine) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        toy_engine.stream([])
    with pytest.raises(UsageError, match="vocabulary"):
        toy_engine.stream([263])
    with pytest.raises(SessionError, match="context"):
        toy_engine.generate([1] * 1001)
