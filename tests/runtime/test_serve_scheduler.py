"""Many requests on one engine: what each gets, and what they do to one another."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.serving import PATIENCE, Gate, until

from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime import Engine, GenerationOptions
from mla_deploy.runtime.serve.job import Job, Piece
from mla_deploy.runtime.serve.scheduler import (
    CHUNK_BESIDE_OTHERS,
    FullError,
    Scheduler,
    StoppedError,
)

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

PROMPT = [72, 101, 108, 108, 111]

Scripted = Callable[[int, Sequence[int]], Engine]


class Request:
    """A request and the pieces that came of it."""

    def __init__(self, scheduler: Scheduler, prompt: list[int], **options: Any) -> None:
        self.pieces: list[Piece] = []
        self._ended = threading.Event()
        chosen = GenerationOptions(**{"max_tokens": 10, **options})
        self.job: Job = scheduler.submit(prompt, chosen, self._listen)

    def _listen(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.is_last:
            self._ended.set()

    @property
    def text(self) -> str:
        """All of it, once it has ended."""
        assert self._ended.wait(PATIENCE)
        return "".join(piece.text for piece in self.pieces)

    @property
    def last(self) -> Piece:
        """The piece with the reason."""
        assert self._ended.wait(PATIENCE)
        return self.pieces[-1]

    @property
    def made(self) -> list[int]:
        """The tokens, once it has ended."""
        assert self._ended.wait(PATIENCE)
        return self.job.ids[-self.job.made_tokens :]


@contextmanager
def scheduling(engine: Engine, *, parallel: int = 4, queue: int = 16) -> Iterator[Scheduler]:
    scheduler = Scheduler(engine, parallel=parallel, queue=queue)
    try:
        yield scheduler
    finally:
        scheduler.stop()


def prompts(count: int, length: int) -> list[list[int]]:
    """Prompts that differ from the first token on."""
    return [[(index + 1) * 7 % 256, *([index + 1] * (length - 1))] for index in range(count)]


def test_a_request_gets_what_the_engine_generates(toy: Toy) -> None:
    engine = toy.load()
    with scheduling(engine) as scheduler:
        request = Request(scheduler, PROMPT, max_tokens=80)
        alone = toy.load().generate(PROMPT, GenerationOptions(max_tokens=80))
        assert (request.text, request.made) == (alone.text, list(alone.tokens))
        assert request.last.finish_reason == alone.finish_reason
        assert sum(piece.tokens for piece in request.pieces) == len(alone.tokens)


def test_sequences_advance_together_and_each_gets_its_own(toy: Toy) -> None:
    engine = toy.load()
    gate = Gate(engine)
    with scheduling(engine) as scheduler:
        requests = [Request(scheduler, prompt, max_tokens=70) for prompt in prompts(4, 50)]
        gate.open()
        for prompt, request in zip(prompts(4, 50), requests, strict=True):
            assert request.made == toy.greedy(prompt, len(request.made))
    assert [1, 1, 1, 1] in gate.steps, "one step makes a token for each"


def test_more_requests_than_places_are_all_answered(toy: Toy) -> None:
    with scheduling(toy.load(), parallel=2) as scheduler:
        requests = [Request(scheduler, prompt) for prompt in prompts(9, 20)]
        for prompt, request in zip(prompts(9, 20), requests, strict=True):
            assert request.made == toy.greedy(prompt, len(request.made))


def test_no_more_sequences_than_places_are_under_way(toy: Toy) -> None:
    engine = toy.load()
    gate = Gate(engine)
    with scheduling(engine, parallel=3) as scheduler:
        requests = [Request(scheduler, prompt) for prompt in prompts(7, 5)]
        gate.open()
        assert all(request.last.finish_reason for request in requests)
    assert max(len(step) for step in gate.steps) == 3


def test_a_long_prompt_delays_others_by_one_chunk_a_token(toy: Toy) -> None:
    engine = toy.load(max_tokens=2000)
    gate = Gate(engine)
    with scheduling(engine) as scheduler:
        short = Request(scheduler, PROMPT, max_tokens=100)
        gate.allow(2)
        long = Request(scheduler, [3] * 600, max_tokens=2)
        gate.open()
        assert long.made == toy.greedy([3] * 600, 2)
        assert short.made == toy.greedy(PROMPT, len(short.made))
    chunks = [index for index, step in enumerate(gate.steps) if step[0] > len(PROMPT)]
    assert sum(gate.steps[index][0] for index in chunks) == 600
    assert all(gate.steps[index][0] <= CHUNK_BESIDE_OTHERS for index in chunks)
    for before, after in itertools.pairwise(chunks):
        assert gate.steps[before + 1 : after] == [[1]], "a token between two chunks"


def test_prompts_take_turns(toy: Toy) -> None:
    """A short one behind a long one is not kept waiting until that has been computed."""
    engine = toy.load(max_tokens=4000, prefill_chunk=512)
    gate = Gate(engine)
    with scheduling(engine) as scheduler:
        first = Request(scheduler, PROMPT, max_tokens=100)
        gate.allow(1)
        long = Request(scheduler, [3] * 700, max_tokens=2)
        short = Request(scheduler, [4] * 10, max_tokens=2)
        gate.open()
        assert all(one.last.finish_reason for one in (first, long, short))
    sizes = [step[0] for step in gate.steps if len(step) == 1 and step[0] > 5]
    assert sizes.index(10) <= 1


def test_a_seed_gives_what_it_gives_alone(toy: Toy) -> None:
    chosen: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3}
    engine = toy.load()
    with scheduling(engine) as scheduler:
        requests = [
            Request(scheduler, PROMPT, max_tokens=40, seed=seed, **chosen) for seed in (1, 2, 3)
        ]
        alone = [
            toy.load().generate(PROMPT, GenerationOptions(max_tokens=40, seed=seed, **chosen))
            for seed in (1, 2, 3)
        ]
        assert [one.made for one in requests] == [list(one.tokens) for one in alone]
    assert len({one.tokens for one in alone}) == 3


def test_an_end_token_a_stop_string_and_the_limit_end_a_text(scripted: Scripted) -> None:
    engine = scripted(5, [*b"one\n", 258, *b"e end", 257, *b"more"])
    with scheduling(engine) as scheduler:
        stopped = Request(scheduler, PROMPT, max_tokens=50, stop=("\nthe",))
        assert (stopped.text, stopped.last.finish_reason) == ("one", "stop")
        ended = Request(scheduler, PROMPT, max_tokens=50)
        assert (ended.text, ended.last.finish_reason) == ("one\nthe end", "eos")
        short = Request(scheduler, PROMPT, max_tokens=4, stop=("\nthe",))
        assert (short.text, short.last.finish_reason) == ("one\n", "length")


def test_a_character_comes_whole_with_the_token_that_completes_it(scripted: Scripted) -> None:
    text = "a\u20ac\U0001f600."
    with scheduling(scripted(5, [*text.encode(), 0xE2])) as scheduler:
        request = Request(scheduler, PROMPT, max_tokens=len(text.encode()) + 1)
        assert request.text == text + "\ufffd"
        shown = [piece.text for piece in request.pieces]
        assert shown == ["a", "", "", "\u20ac", "", "", "", "\U0001f600", ".", "\ufffd"]


def test_the_models_context_ends_a_text(toy: Toy) -> None:
    with scheduling(toy.load(max_tokens=2000)) as scheduler:
        request = Request(scheduler, [1] * 995, max_tokens=100)
        assert request.made == toy.greedy([1] * 995, 6)
        assert request.last.finish_reason == "context"


def test_a_full_cache_ends_the_text_of_the_only_request(toy: Toy) -> None:
    with scheduling(toy.load(max_tokens=128)) as scheduler:
        request = Request(scheduler, [1] * 120, max_tokens=100)
        assert request.last.finish_reason == "context"
        assert request.made == toy.greedy([1] * 120, 9), "the last one needs no place"
        again = Request(scheduler, [1] * 128, max_tokens=100)
        assert again.made == toy.greedy([1] * 128, 1)


def test_where_pages_run_out_the_last_request_waits_and_goes_on_as_if_it_had_not(toy: Toy) -> None:
    engine = toy.load(max_tokens=4 * 64)
    gate = Gate(engine)
    options: dict[str, Any] = {"max_tokens": 100, "temperature": 1.0, "seed": 1}
    long, short = [7, *[1] * 59], [14, *[2] * 29]
    with scheduling(engine) as scheduler:
        first, last = (Request(scheduler, prompt, **options) for prompt in (long, short))
        gate.open()
        for prompt, request in ((long, first), (short, last)):
            alone = toy.load().generate(prompt, GenerationOptions(**options))
            assert len(alone.tokens) == 100
            assert request.made == list(alone.tokens)
            assert request.text == alone.text
            assert request.last.cached_tokens == 0
    at = gate.steps.index([1, 1])
    (again,) = [step for step in gate.steps[at:] if max(step) > 1]
    assert again[0] in range(31, 130 - 30), "the last one was computed anew, once"


def test_the_cache_is_shared_by_as_many_as_fit(toy: Toy) -> None:
    engine = toy.load(max_tokens=4 * 64)
    with scheduling(engine, parallel=8) as scheduler:
        requests = [Request(scheduler, prompt, max_tokens=90) for prompt in prompts(8, 50)]
        for prompt, request in zip(prompts(8, 50), requests, strict=True):
            assert request.made == toy.greedy(prompt, len(request.made))


def test_a_request_is_admitted_only_when_its_whole_prompt_has_room(toy: Toy) -> None:
    """Also beside one whose prompt is not computed yet: nothing is computed twice."""
    engine = toy.load(max_tokens=8 * 64)
    gate = Gate(engine)
    with scheduling(engine) as scheduler:
        requests = [Request(scheduler, prompt, max_tokens=3) for prompt in prompts(3, 300)]
        gate.open()
        for prompt, request in zip(prompts(3, 300), requests, strict=True):
            assert request.made == toy.greedy(prompt, 3)
    assert sum(sum(step) for step in gate.steps) == 3 * (300 + 2)


def test_a_prompt_that_can_never_fit_is_refused(toy: Toy) -> None:
    with scheduling(toy.load(max_tokens=128)) as scheduler:
        with pytest.raises(SessionError, match="too long"):
            Request(scheduler, [1] * 129)
        assert Request(scheduler, PROMPT).last.finish_reason == "length"


@pytest.mark.parametrize("prompt", [[], [263], [-1]])
def test_prompts_that_are_none_are_refused(toy: Toy, prompt: list[int]) -> None:
    with scheduling(toy.load()) as scheduler, pytest.raises(UsageError):
        Request(scheduler, prompt)


def test_a_cancelled_request_frees_its_pages_and_its_place(toy: Toy) -> None:
    engine = toy.load(max_tokens=512)
    gate = Gate(engine)
    with scheduling(engine, parallel=1) as scheduler:
        first = Request(scheduler, [1] * 200, max_tokens=500)
        second = Request(scheduler, PROMPT, max_tokens=3)
        gate.allow(2)
        assert engine.free_tokens == 512 - 256
        first.job.cancel()
        gate.allow(1)
        assert engine.free_tokens == 512
        gate.open()
        assert second.made == toy.greedy(PROMPT, 3)
    assert not first.pieces[-1].is_last


def test_a_request_that_is_cancelled_while_it_waits_is_never_computed(toy: Toy) -> None:
    engine = toy.load()
    gate = Gate(engine)
    with scheduling(engine, parallel=1) as scheduler:
        first = Request(scheduler, PROMPT, max_tokens=3)
        second = Request(scheduler, [9] * 77, max_tokens=3)
        gate.allow(1)
        second.job.cancel()
        gate.open()
        assert first.last.finish_reason == "length"
        assert Request(scheduler, [8] * 5).last.finish_reason
    assert second.pieces == []
    assert not any(77 in step for step in gate.steps)


def test_a_full_queue_refuses_and_has_room_again_later(toy: Toy) -> None:
    engine = toy.load()
    gate = Gate(engine)
    with scheduling(engine, parallel=1, queue=2) as scheduler:
        requests = [Request(scheduler, PROMPT, max_tokens=2) for _ in range(3)]
        assert scheduler.full
        with pytest.raises(FullError):
            Request(scheduler, PROMPT)
        requests[2].job.cancel()
        gate.open()
        assert requests[1].last.finish_reason == "length"
        until(lambda: not scheduler.full)
        assert Request(scheduler, PROMPT).last.finish_reason


def test_a_step_that_fails_for_one_goes_on_for_the_others(own_toy: Toy) -> None:
    """The graph fails above a length; whoever reaches it is alone with that."""
    own_toy.fail_above(60, "ReduceMax <keepdims = 0> (past_lengths)")
    engine = own_toy.load()
    gate = Gate(engine)
    with scheduling(engine) as scheduler:
        harmed = Request(scheduler, [3] * 50, max_tokens=60)
        well = Request(scheduler, PROMPT, max_tokens=40)
        gate.open()
        assert isinstance(harmed.last.error, SessionError)
        assert well.made == own_toy.greedy(PROMPT, 40)
        assert Request(scheduler, PROMPT).made == own_toy.greedy(PROMPT, 10)
    assert engine.free_tokens == engine.capacity_tokens


def test_logits_that_are_no_numbers_harm_nobody_else(toy: Toy) -> None:
    engine = toy.load()
    step = engine.step

    def broken(requests: Any, **options: Any) -> Any:
        rows = step(requests, **options)
        for (session, _), row in zip(requests, rows, strict=True):
            if session.tokens[0] == 2 and session.length > 20:
                row.fill(np.nan)
        return rows

    engine.step = broken  # type: ignore[method-assign]
    with scheduling(engine) as scheduler:
        harmed = Request(scheduler, [2] * 15, max_tokens=60)
        well = Request(scheduler, PROMPT, max_tokens=40)
        assert isinstance(harmed.last.error, SessionError)
        assert well.made == toy.greedy(PROMPT, 40)


def test_a_bug_ends_what_is_under_way_and_not_the_scheduler(toy: Toy) -> None:
    engine = toy.load()
    step, failures = engine.step, [ZeroDivisionError("by nothing")]

    def broken(requests: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return step(requests, **options)

    engine.step = broken  # type: ignore[method-assign]
    with scheduling(engine) as scheduler:
        assert isinstance(Request(scheduler, PROMPT).last.error, SessionError)
        assert Request(scheduler, PROMPT).made == toy.greedy(PROMPT, 10)


def test_stopping_ends_every_request_with_an_error(toy: Toy) -> None:
    engine = toy.load()
    gate = Gate(engine)
    with scheduling(engine, parallel=1) as scheduler:
        requests = [Request(scheduler, PROMPT, max_tokens=500) for _ in range(3)]
        gate.allow(3)
        gate.open()
        scheduler.stop()
        assert all("stopping" in str(request.last.error) for request in requests)
        with pytest.raises(StoppedError):
            Request(scheduler, PROMPT)
    assert engine.free_tokens == engine.capacity_tokens


def test_the_start_of_an_ended_request_is_used_again(toy: Toy) -> None:
    engine = toy.load()
    gate = Gate(engine)
    gate.open()
    with scheduling(engine) as scheduler:
        first = Request(scheduler, [5] * 150, max_tokens=20)
        turn = [*[5] * 150, *first.made, 7, 8]
        second = Request(scheduler, turn, max_tokens=20)
        assert second.made == toy.greedy(turn, 20)
        assert (first.last.cached_tokens, second.last.cached_tokens) == (0, 150 + 19)
        other = Request(scheduler, [*[5] * 100, 9, 9, 9], max_tokens=20)
        assert other.made == toy.greedy([*[5] * 100, 9, 9, 9], 20)
        assert other.last.cached_tokens == 100
        again = Request(scheduler, [5] * 150, max_tokens=20)
        assert again.made == first.made
        assert again.last.cached_tokens == 149, "the last token is computed for its logits"
    assert [3] in gate.steps


def test_kept_prefixes_make_room_for_new_requests(toy: Toy) -> None:
    engine = toy.load(max_tokens=256)
    with scheduling(engine) as scheduler:
        for prompt in prompts(5, 150):
            request = Request(scheduler, prompt, max_tokens=30)
            assert request.made == toy.greedy(prompt, len(request.made))
        assert Request(scheduler, [1] * 256, max_tokens=9).last.finish_reason == "context"
    assert engine.free_tokens == 256


def test_a_prefix_of_a_full_cache_can_be_gone_on_from(toy: Toy) -> None:
    """The kept session and its fork share a page that must be copied, but there is none left."""
    engine = toy.load(max_tokens=128)
    with scheduling(engine) as scheduler:
        Request(scheduler, [1] * 100, max_tokens=20).text  # noqa: B018 - waits
        prompt = [*[1] * 90, *[2] * 38]
        assert Request(scheduler, prompt, max_tokens=5).made == toy.greedy(prompt, 1)


def test_cached_tokens_are_those_of_the_first_admission(toy: Toy) -> None:
    engine = toy.load()
    job = Job(engine, PROMPT.copy(), GenerationOptions(), lambda piece: None)
    with engine.session() as first, engine.session() as second:
        job.begin(first)
        job.pick(first.prefill(PROMPT))
        second.prefill(PROMPT)
        assert job.leave() is first
        job.begin(second)
    assert (job.cached_tokens, job.computed) == (0, len(PROMPT))
