"""The protocol, as OpenAI's own client speaks it with a server at a real socket."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from support.serving import Gate, Running, serving, until

from mla_deploy.bundle import describe_file, write_manifest
from mla_deploy.manifest import Manifest
from mla_deploy.runtime import Engine, GenerationOptions, load
from mla_deploy.runtime.serve import http

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

PROMPT = [72, 101, 108, 108, 111]
TEXTS = ("My dear fellow", "The lighthouse keeper", "Question: what is", "In the beginning")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"

Scripted = Callable[[int, Sequence[int]], Engine]


@pytest.fixture(scope="module")
def tiny_chat(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-mla with a chat template."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("chat") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    files = [*manifest.files, describe_file(folder, "chat_template.jinja")]
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    return folder


@pytest.fixture(scope="module")
def engine(tiny_chat: Path) -> Engine:
    """The oracle: nobody else computes with it."""
    return load(tiny_chat, threads=1, spin=False)


@pytest.fixture(scope="module")
def tiny(tiny_chat: Path) -> Iterator[Running]:
    """A server of tiny-mla."""
    with serving(load(tiny_chat, threads=1, spin=False), model_name="tiny") as running:
        yield running


def greedy(engine: Engine, prompt: str | list[int], count: int) -> str:
    return engine.generate(prompt, GenerationOptions(max_tokens=count)).text


def test_a_completion_is_the_text_that_the_engine_generates(tiny: Running, engine: Engine) -> None:
    made = tiny.client.completions.create(
        model="tiny", prompt=TEXTS[0], max_tokens=40, temperature=0
    )
    expected = engine.generate(TEXTS[0], GenerationOptions(max_tokens=40))
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == "length"
    assert (made.object, made.model, len(made.choices)) == ("text_completion", "tiny", 1)
    assert made.usage is not None
    assert made.usage.completion_tokens == len(expected.tokens)
    assert made.usage.prompt_tokens == expected.statistics.prompt_tokens
    assert made.usage.total_tokens == made.usage.prompt_tokens + 40
    assert made.usage.prompt_tokens_details is not None


def test_a_prompt_of_token_ids_is_taken_as_it_is(tiny: Running, engine: Engine) -> None:
    ids = engine.tokenizer.encode(TEXTS[1])
    for prompt in (ids, [ids], [TEXTS[1]]):
        made = tiny.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0
        )
        assert made.choices[0].text == greedy(engine, TEXTS[1], 20)


def test_a_stream_of_completions_is_the_same_text_in_chunks(tiny: Running, engine: Engine) -> None:
    chunks = list(
        tiny.client.completions.create(
            model="tiny",
            prompt=TEXTS[2],
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *shown, last = chunks
    assert "".join(chunk.choices[0].text for chunk in shown) == greedy(engine, TEXTS[2], 30)
    assert [chunk.choices[0].finish_reason for chunk in shown[:-1]] == [None] * (len(shown) - 1)
    assert shown[-1].choices[0].finish_reason == "length"
    assert {chunk.usage for chunk in shown} == {None}
    assert (last.choices, last.usage and last.usage.completion_tokens) == ([], 30)
    assert len({chunk.id for chunk in chunks}) == 1
    raw = tiny.complete(prompt=TEXTS[2], max_tokens=3, stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_a_chat_goes_through_the_template(tiny: Running, engine: Engine) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}],
        },
    ]
    ids = engine.tokenizer.encode("[system]Be short.[user]Hi![assistant]", add_special_tokens=False)
    expected = greedy(engine, ids, 25)
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0}
    made = tiny.client.chat.completions.create(**asked, max_completion_tokens=25)
    assert made.choices[0].message.content == expected
    assert (made.choices[0].message.role, made.object) == ("assistant", "chat.completion")
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(ids)

    chunks = list(tiny.client.chat.completions.create(**asked, max_tokens=25, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert "usage" not in chunks[0].model_fields_set


def test_the_next_turn_of_a_chat_takes_the_answer_as_it_came(tiny: Running) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me of the sea, at length, please."}]
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    first = tiny.client.chat.completions.create(messages=messages, **asked)
    messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "Go on"}]
    second = tiny.client.chat.completions.create(messages=messages, **asked)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached >= first.usage.prompt_tokens - 1


def test_a_prompt_seen_before_gives_the_same_text_and_says_what_was_cached(
    tiny: Running, engine: Engine
) -> None:
    prompt = "It was the custom of the house that nobody spoke of the sea after supper"
    expected = greedy(engine, prompt, 20)
    length = len(engine.tokenizer.encode(prompt))
    for cached in (None, length - 1):
        made = tiny.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0
        )
        assert made.choices[0].text == expected
        assert made.usage is not None
        assert made.usage.prompt_tokens_details is not None
        assert cached in (None, made.usage.prompt_tokens_details.cached_tokens)


def test_concurrent_streams_are_what_each_is_alone(tiny: Running, engine: Engine) -> None:
    def text(prompt: str) -> str:
        stream = tiny.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=60, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(text, TEXTS * 2))
    assert found == [greedy(engine, prompt, 60) for prompt in TEXTS * 2]


def test_a_seed_can_be_repeated(tiny: Running, engine: Engine) -> None:
    def text(seed: int | None) -> str:
        made = tiny.client.completions.create(
            model="tiny", prompt=TEXTS[0], max_tokens=24, temperature=1.2, top_p=0.95, seed=seed
        )
        return made.choices[0].text

    options = GenerationOptions(max_tokens=24, temperature=1.2, top_p=0.95, seed=7)
    assert text(7) == text(7) == engine.generate(TEXTS[0], options).text
    assert text(-3) == text(-3) != text(7)
    assert len({text(None) for _ in range(3)}) == 3


def test_what_openai_leaves_at_1_is_1_here(tiny: Running, engine: Engine) -> None:
    made = tiny.client.completions.create(model="tiny", prompt=TEXTS[0], seed=9)
    options = GenerationOptions(max_tokens=16, temperature=1.0, seed=9)
    assert made.choices[0].text == engine.generate(TEXTS[0], options).text


@pytest.mark.parametrize("ours", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_sampling_obeys_its_options(tiny: Running, engine: Engine, ours: dict[str, Any]) -> None:
    made = tiny.complete(prompt=TEXTS[3], max_tokens=12, temperature=1.5, seed=1, **ours)
    assert made.json()["choices"][0]["text"] == greedy(engine, TEXTS[3], 12)


def test_the_repetition_penalty_counts_the_prompt(tiny: Running, engine: Engine) -> None:
    made = tiny.complete(prompt=TEXTS[3], max_tokens=30, repetition_penalty=1.8)
    options = GenerationOptions(max_tokens=30, repetition_penalty=1.8)
    assert made.json()["choices"][0]["text"] == engine.generate(TEXTS[3], options).text
    assert options != GenerationOptions(max_tokens=30)
    assert engine.generate(TEXTS[3], options).text != greedy(engine, TEXTS[3], 30)


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(own_toy: Toy) -> None:
    (own_toy.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    own_toy.seal()
    with serving(own_toy.load()) as running:
        made = running.client.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "a" * 990}], temperature=0
        )
        assert made.usage is not None
        ends = own_toy.greedy([97] * 990, 11)
        assert 257 not in ends
        assert (made.usage.completion_tokens, made.choices[0].finish_reason) == (11, "length")


def test_stop_strings_and_end_tokens_are_one_reason(scripted: Scripted) -> None:
    with serving(scripted(5, [*b"one\n", 258, *b"e end", 257])) as running:
        asked: dict[str, Any] = {
            "model": "toy",
            "prompt": PROMPT,
            "temperature": 0,
            "max_tokens": 40,
        }
        for stop in ("\nthe", ["zzz", "\nthe"]):
            made = running.client.completions.create(**asked, stop=stop)
            assert made.choices[0].text == "one", "it is spread over three tokens"
            assert made.choices[0].finish_reason == "stop"
        chunks = list(running.client.completions.create(**asked, stop="\nthe", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "one"
        ended = running.client.completions.create(**asked)
        assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("one\nthe end", "stop")
        assert ended.usage is not None
        assert ended.usage.completion_tokens == 11, "with the end token, as the engine counts"


def test_no_chunk_holds_half_a_character(scripted: Scripted) -> None:
    text = "a\u20ac\U0001f600\xe9."
    with serving(scripted(5, [*text.encode(), 0xE2, 0x82])) as running:
        stream = running.client.completions.create(
            model="toy",
            prompt=PROMPT,
            max_tokens=len(text.encode()) + 2,
            temperature=0,
            stream=True,
        )
        shown = [chunk.choices[0].text for chunk in stream]
        assert "".join(shown) == text + "\ufffd", "half a character at the end is replaced"
        assert not any("\ufffd" in one for one in shown[:-1])


def test_models_are_listed(tiny: Running) -> None:
    assert [model.id for model in tiny.client.models.list()] == ["tiny"]
    assert tiny.client.models.retrieve("tiny").owned_by == "mla-deploy"


def test_health_needs_no_key_and_all_else_does(toy: Toy) -> None:
    with serving(toy.load(), api_key="s3cret") as running:
        assert running.http.get("../health", headers={"Authorization": ""}).json() == {
            "status": "ok"
        }
        assert running.client.models.list().data
        assert running.complete(prompt=PROMPT).status_code == 200
        for given in (
            "",
            "Bearer wrong",
            "Bearer s3cre",
            "s3cret",
            "Bearer s3cret2",
            "Bearer \xe9",
        ):
            headers = {"Authorization": given.encode("latin-1")}
            for method, path in (
                ("GET", "models"),
                ("GET", "models/toy"),
                ("POST", "completions"),
                ("POST", "chat/completions"),
            ):
                refused = running.http.request(method, path, headers=headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.json()["error"]["code"] == "invalid_api_key"


def test_a_client_that_leaves_a_stream_frees_its_pages(scripted: Scripted) -> None:
    engine = scripted(200, [65] * 790)
    gate = Gate(engine)
    with serving(engine, parallel=1) as running:
        body = {"prompt": [1] * 200, "max_tokens": 700, "temperature": 0, "stream": True}
        with running.http.stream("POST", "/completions", json=body) as stream:
            gate.allow(3)
            assert next(stream.iter_lines()).startswith("data: ")
            assert engine.capacity_tokens - engine.free_tokens == 256
        _free_after_cancel(engine, gate)
        gate.open()
        assert running.complete(prompt=PROMPT).json()["usage"]["completion_tokens"] == 16


def test_a_stream_says_that_it_is_there_while_its_prompt_is_computed(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SILENT_SECONDS", 0.01)
    engine = scripted(5, [65, 66, 67])
    gate = Gate(engine)
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    with serving(engine) as running:
        with running.http.stream("POST", "/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert [next(lines) for _ in range(4)] == [":", "", ":", ""]
            gate.open()
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        # The client of the protocol does not see them.
        made = running.client.completions.create(
            model="toy", prompt=PROMPT, max_tokens=3, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in made) == "ABC"


def test_a_client_that_leaves_before_a_whole_answer_frees_its_pages(scripted: Scripted) -> None:
    engine = scripted(5, [65] * 990)
    gate = Gate(engine)
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0}
    with serving(engine, parallel=1) as running:
        with (
            httpx.Client(base_url=running.server.url, timeout=0.3) as hasty,
            pytest.raises(httpx.ReadTimeout),
        ):
            hasty.post("/completions", json=body)
        until(lambda: len(gate.steps) == 1)
        _free_after_cancel(engine, gate)
        gate.open()
        assert running.complete(prompt=PROMPT).status_code == 200


def _free_after_cancel(engine: Engine, gate: Gate) -> None:
    """The one request there was makes no more steps, and its pages are free."""

    def freed() -> bool:
        gate.release()
        return gate.done > 0 and engine.free_tokens == engine.capacity_tokens

    until(freed)  # at its end it would be kept for others


def test_as_many_as_can_wait_are_taken_and_the_next_is_told_to_come_again(toy: Toy) -> None:
    engine = toy.load()
    gate = Gate(engine)
    with serving(engine, parallel=1) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:
        taken = [pool.submit(running.complete, prompt=PROMPT, max_tokens=2) for _ in range(5)]
        refused = []

        def full() -> bool:
            refused.append(running.http.post("/completions", json={"prompt": [1], "n": 2}))
            return refused[-1].status_code == 503

        until(full)
        assert refused[-1].headers["retry-after"] == "1"
        assert refused[-1].json()["error"]["code"] == "server_full"
        gate.open()
        assert [one.result().status_code for one in taken] == [200] * 5
        assert running.complete(prompt=PROMPT).status_code == 200


def test_a_failure_of_the_model_is_told_and_harms_no_other(own_toy: Toy) -> None:
    own_toy.fail_above(60, "ReduceMax <keepdims = 0> (past_lengths)")
    with serving(own_toy.load()) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked: dict[str, Any] = {"prompt": [3] * 50, "max_tokens": 60}
        whole = pool.submit(running.complete, **asked)
        stream = pool.submit(running.complete, **asked, stream=True)
        well = pool.submit(running.complete, prompt=PROMPT, max_tokens=40)
        assert well.result().json()["usage"]["completion_tokens"] == 40
        assert whole.result().status_code == 500
        error = whole.result().json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "model_failed")
        events = [line for line in stream.result().text.splitlines() if line]
        assert json.loads(events[-1].removeprefix("data: ")) == {"error": error}
        assert "onnx" not in whole.result().text
        with pytest.raises(Exception, match="the model failed"):
            list(
                running.client.completions.create(model="toy", **asked, temperature=0, stream=True)
            )
