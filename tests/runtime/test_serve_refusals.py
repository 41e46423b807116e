"""What is refused, and how a client is told."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from support.serving import Running, serving, until

from mla_deploy.runtime import Engine
from mla_deploy.runtime.serve import http as serve_http
from mla_deploy.runtime.serve.server import QUEUE_PER_SLOT, SPARE_CONNECTIONS

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

PROMPT = [72, 101, 108, 108, 111]
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def running(toy: Toy) -> Iterator[Running]:
    """A server of the toy, which has no chat template."""
    with serving(toy.load()) as one:
        yield one


@pytest.fixture
def chatting(own_toy: Toy) -> Iterator[Running]:
    """One of a toy that has."""
    (own_toy.path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    own_toy.seal()
    with serving(own_toy.load()) as one:
        yield one


def refused(
    running: Running, path: str, body: Any, status: int = 400, **options: Any
) -> dict[str, Any]:
    """The error object."""
    if isinstance(body, dict):
        options["json"] = body
    else:
        options["content"] = body
        options.setdefault("headers", {"Content-Type": "application/json"})
    answer = running.http.post(path, **options)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text
    return error


BOTH: list[tuple[str, Any]] = [
    ("n", 2),
    ("frequency_penalty", 0.5),
    ("presence_penalty", -0.5),
    ("logit_bias", {"5": 1}),
    ("max_tokens", 0),
    ("max_tokens", "9"),
    ("max_tokens", 9.5),
    ("max_tokens", True),
    ("max_tokens", 1 << 32),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("seed", 1.5),
    ("seed", 1 << 63),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", 3),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("stream_options", {"include_obfuscation": True}),
    ("user", 3),
    ("model", 3),
    ("temperatur", 1),
    ("ignore_eos", True),
]
COMPLETIONS: list[tuple[str, Any]] = [
    ("best_of", 2),
    ("echo", True),
    ("logprobs", 0),
    ("suffix", "end"),
    ("max_completion_tokens", 5),
    ("messages", MESSAGES),
    ("prompt", None),
    ("prompt", []),
    ("prompt", 5),
    ("prompt", [1.5]),
    ("prompt", ["one", "two"]),
    ("prompt", [[1], [2]]),
    ("prompt", [[]]),
    ("prompt", ["one", 2]),
    ("prompt", [263]),
    ("prompt", [-1]),
]
CHATS: list[tuple[str, Any]] = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("functions", []),
    ("response_format", {"type": "json_object"}),
    ("logprobs", True),
    ("top_logprobs", 2),
    ("modalities", ["audio"]),
    ("store", True),
    ("reasoning_effort", "low"),
    ("prediction", {}),
    ("audio", {}),
    ("web_search_options", {}),
    ("max_completion_tokens", 0),
    ("prompt", "Hi"),
    ("messages", []),
    ("messages", "Hi"),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]),
    ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
    ("messages", [{"role": "user", "content": "x", "tool_call_id": "1"}]),
]


@pytest.mark.parametrize(("field", "value"), [*BOTH, *COMPLETIONS])
def test_a_completion_names_the_field_that_it_refuses(
    running: Running, field: str, value: Any
) -> None:
    error = refused(running, "/completions", {"prompt": PROMPT, field: value})
    assert error["param"].split(".")[0] == field
    assert field in error["message"] or (field, error["param"]) == ("prompt", "prompt")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("field", "value"), [*BOTH, *CHATS])
def test_a_chat_names_the_field_that_it_refuses(running: Running, field: str, value: Any) -> None:
    error = refused(running, "/chat/completions", {"messages": MESSAGES, field: value})
    assert error["param"].split(".")[0] == field
    assert field in error["message"]


def test_two_limits_are_one_too_many(running: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 3}
    assert "one limit" in _chat_error(running, body)["message"]


def _chat_error(running: Running, body: dict[str, Any]) -> dict[str, Any]:
    return refused(running, "/chat/completions", body)


NEUTRAL: dict[str, Any] = {
    "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "somebody",
    "seed": None, "stop": None, "stream": False, "stream_options": None, "temperature": None,
}  # fmt: skip


def test_values_that_change_nothing_are_taken(running: Running, chatting: Running) -> None:
    extra = {"best_of": 1, "echo": False, "logprobs": None, "suffix": None}
    body = {"prompt": PROMPT, **NEUTRAL, **extra}
    assert running.http.post("/completions", json=body).status_code == 200
    extra = {
        "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "tools": [],
        "tool_choice": "none", "modalities": ["text"], "store": False, "service_tier": "auto",
        "metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s",
        "parallel_tool_calls": True, "max_completion_tokens": 4,
    }  # fmt: skip
    body = {"messages": MESSAGES, **NEUTRAL, **extra}
    assert chatting.http.post("/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"nothing", b"[]", b"3", b"null", b'{"prompt": "a"', b"\xff\xfe",
     b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}', b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(running: Running, body: bytes) -> None:
    refused(running, "/completions", body)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_any_web_page_could_send_is_refused(running: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    body = json.dumps({"prompt": PROMPT}).encode()
    assert "json" in refused(running, "/completions", body, 415, headers=headers)["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_http, "MOST_BODY_BYTES", 1000)
    error = refused(running, "/completions", {"prompt": "a" * 1000}, 413)
    assert "1000 bytes" in error["message"]
    pieces = (b'{"prompt": "' + b"a" * 2000, b'"}')  # without a length that could be looked at
    refused(running, "/completions", iter(pieces), 413)
    assert running.complete(prompt="a" * 100).status_code == 200


def test_a_body_that_does_not_arrive_is_not_waited_for(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_http, "BODY_SECONDS", 0.05)
    place = urlsplit(running.server.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"prompt"')
    answer = connection.getresponse()
    assert (answer.status, b"did not arrive" in answer.read()) == (408, True)
    connection.close()


def test_a_prompt_that_is_too_long_is_refused(running: Running) -> None:
    error = refused(running, "/completions", {"prompt": [1] * 1001})
    assert error["code"] == "context_length_exceeded"
    assert "1001" in error["message"]
    assert "1000" in error["message"]
    assert running.complete(prompt=[1] * 1000, max_tokens=5).status_code == 200


def test_an_option_that_turns_out_to_be_wrong_later_is_the_clients_error(
    scripted: Callable[[int, Sequence[int]], Engine],
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 50, "temperature": 0, "repetition_penalty": 1e-40}
    with serving(scripted(5, [65] * 90)) as running:
        assert "penalty" in refused(running, "/completions", body)["message"]


def test_another_model_is_not_there(running: Running) -> None:
    error = refused(running, "/completions", {"prompt": PROMPT, "model": "gpt"}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'toy'" in error["message"]
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("gpt/4")


def test_the_official_client_raises_its_own_errors(running: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        running.client.completions.create(model="toy", prompt=PROMPT, n=3)
    assert caught.value.param == "n"


def test_a_bundle_without_a_template_has_no_chats(running: Running, toy: Toy) -> None:
    error = _chat_error(running, {"messages": MESSAGES})
    assert "no chat template" in error["message"]
    assert str(toy.path) not in error["message"], "where the bundle lies is not for clients"


def test_a_template_may_refuse_a_conversation(chatting: Running, own_toy: Toy) -> None:
    body = {"messages": [{"role": "developer", "content": "x"}, *MESSAGES]}
    error = _chat_error(chatting, body)
    assert "no system" in error["message"]
    assert str(own_toy.path) not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/completions", 405), ("POST", "/models", 405), ("GET", "/nothing", 404),
     ("GET", "/../docs", 404), ("GET", "/../openapi.json", 404)],
)  # fmt: skip
def test_what_is_no_route_is_told_in_the_same_form(
    running: Running, method: str, path: str, status: int
) -> None:
    answer = running.http.request(method, path)
    assert (answer.status_code, set(answer.json()["error"])) == (
        status,
        {"message", "type", "param", "code"},
    )


def test_a_bug_is_told_without_a_traceback(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with serving(toy.load()) as running:
        monkeypatch.setattr("mla_deploy.runtime.serve.app.parse", broken)
        error = refused(running, "/completions", {"prompt": PROMPT}, 500)
        assert (error["message"], error["type"]) == ("the server failed", "server_error")


def test_connections_are_bounded(toy: Toy) -> None:
    """A body may be large, and is read before a request waits for its turn."""
    with serving(toy.load(), parallel=1) as running, ExitStack() as opened:
        place = urlsplit(running.server.url)
        for _ in range(1 + QUEUE_PER_SLOT + SPARE_CONNECTIONS):
            address = (str(place.hostname), int(place.port or 0))
            opened.enter_context(socket.create_connection(address))
        until(lambda: httpx.get(f"{running.server.url}/models").status_code == 503)
        opened.close()
        until(lambda: httpx.get(f"{running.server.url}/models").status_code == 200)


def test_without_a_key_the_server_answers_to_its_own_address_only(toy: Toy) -> None:
    """Else a page whose name was made to lead to 127.0.0.1 could read what it answers."""
    with serving(toy.load()) as running:
        for host in ("localhost", "LOCALHOST", "localhost:1", "127.0.0.1:80", "[::1]:80"):
            assert running.http.get("/models", headers={"Host": host}).status_code == 200
        for host in (
            "evil.example", "evil.example:8000", "localhost.evil.example", "", 'a"b.evil.example',
            "a{b.evil.example", "evil.example/..", "x@127.0.0.1", "127.0.0.1:80:80", "::1",
            "127.0.0.1#", "[127.0.0.1", "localhost:x",
        ):  # fmt: skip
            assert running.http.get("/models", headers={"Host": host}).status_code == 403
    with serving(toy.load(), api_key="k") as running:
        assert running.http.get("/models", headers={"Host": "proxy.example"}).status_code == 200
