"""The socket, the start and the end of a server."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from support.serving import PATIENCE, Gate, serving, until

from mla_deploy.errors import TokenizerError, UsageError
from mla_deploy.runtime import Engine
from mla_deploy.runtime.serve.job import Job
from mla_deploy.runtime.serve.scheduler import Scheduler
from mla_deploy.runtime.serve.server import Server, ServerOptions, bind, require_extra

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

Scripted = Callable[[int, Sequence[int]], Engine]

PROMPT = [72, 101, 108, 108, 111]


def test_a_port_in_use_is_the_users_to_change() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(UsageError, match="in use") as caught:
            bind("127.0.0.1", first.getsockname()[1])
        assert "--port" in str(caught.value)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "300.1.1.1"])
def test_an_address_of_another_machine_cannot_be_listened_at(host: str) -> None:
    with pytest.raises(UsageError, match="cannot listen"):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "k", False)],
)
def test_a_public_address_without_a_key_is_warned_of(
    toy: Toy, host: str, key: str | None, warned: bool
) -> None:
    with bind(host, 0) as bound:
        server = Server(toy.load(), bound, ServerOptions(api_key=key))
        assert bool(server.warnings) is warned
        assert not warned or "MLA_DEPLOY_API_KEY" in server.warnings[0]
        assert server.model_name == toy.path.name
        assert server.url == f"http://{host}:{bound.getsockname()[1]}/v1"


def test_ipv6_is_an_address_like_others(toy: Toy) -> None:
    try:
        bound = bind("::1", 0)
    except UsageError:
        pytest.skip("this machine has no IPv6")
    with bound:
        assert Server(toy.load(), bound, ServerOptions()).url.startswith("http://[::1]:")


@pytest.mark.parametrize("options", [{"parallel": 0}, {"api_key": ""}, {"api_key": "  "}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServerOptions(**options)


@pytest.mark.parametrize("name", ["fastapi", "uvicorn"])
def test_a_missing_extra_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda one: None if one == name else found(one))
    with pytest.raises(UsageError, match=name) as caught:
        require_extra()
    assert caught.value.hint == "pip install fastapi uvicorn"


def test_a_bundle_without_a_tokenizer_is_refused_at_once(own_toy: Toy) -> None:
    (own_toy.path / "tokenizer.json").unlink()
    own_toy.seal()
    with bind("127.0.0.1", 0) as bound, pytest.raises(TokenizerError, match="no tokenizer"):
        Server(own_toy.load(), bound, ServerOptions())


def test_engines_that_compute_one_sequence_at_a_time_are_refused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = toy.load()
    monkeypatch.setattr(type(engine), "batches", False)  # as TensorRT's
    with bind("127.0.0.1", 0) as bound, pytest.raises(UsageError, match="TensorRT"):
        Server(engine, bound, ServerOptions())


def test_stopping_ends_every_request_with_an_error_and_frees_the_cache(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []
    submit = Scheduler.submit
    monkeypatch.setattr(Scheduler, "submit", lambda *given: jobs.append(submit(*given)) or jobs[-1])
    engine = scripted(5, [65] * 990)
    gate = Gate(engine)
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with serving(engine, parallel=1) as running:
            stream = pool.submit(running.http.post, "/completions", json={**body, "stream": True})
            gate.allow(3)
            waiting = pool.submit(running.http.post, "/completions", json=body)
            until(lambda: len(jobs) == 2)
            running.server.stop()

            def ended() -> bool:
                gate.release()  # a step that has begun is waited for
                return stream.done() and waiting.done()

            until(ended)
            gate.open()
        assert stream.result().text.count("data: ") > 2
        assert '"code":"server_stopping"' in stream.result().text
        assert "[DONE]" not in stream.result().text
        assert waiting.result().status_code == 503
    assert engine.free_tokens == engine.capacity_tokens


def test_a_server_that_has_ended_leaves_its_port(toy: Toy) -> None:
    with serving(toy.load()) as running:
        port = int(running.server.url.rsplit(":", 1)[1].removesuffix("/v1"))
    with bind("127.0.0.1", port) as again:
        again.listen()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_server_that_is_told_to_end_before_it_listens_ends(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bind("127.0.0.1", 0) as bound:
        server = Server(toy.load(), bound, ServerOptions())
        run = server._uvicorn.run

        def told(sockets: Any) -> None:
            signal.raise_signal(signal.SIGTERM)
            run(sockets)

        monkeypatch.setattr(server._uvicorn, "run", told)
        before = signal.getsignal(signal.SIGTERM)
        rescue = threading.Timer(PATIENCE, server.stop)
        rescue.start()
        server.run()
        assert rescue.is_alive()
        rescue.cancel()
        assert signal.getsignal(signal.SIGTERM) is before
