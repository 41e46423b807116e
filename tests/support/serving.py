"""A server in a thread, and an engine whose steps wait for the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from mla_deploy.runtime import Engine
from mla_deploy.runtime.serve.server import Server, ServerOptions, bind

PATIENCE = 30
"""Seconds after which something will not happen any more."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    server: Server
    client: openai.OpenAI
    http: httpx.Client

    def complete(self, **fields: Any) -> httpx.Response:
        """POST /v1/completions with these fields, greedy unless they say otherwise."""
        return self.http.post("/completions", json={"temperature": 0, **fields})


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Running]:
    """The server of an engine at a free port, and clients that have its key."""
    key = options.get("api_key")
    with bind("127.0.0.1", 0) as bound:
        server = Server(engine, bound, ServerOptions(**{"model_name": "toy", **options}))
        thread = threading.Thread(target=server.run)
        thread.start()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        client = openai.OpenAI(
            base_url=server.url, api_key=key or "none", max_retries=0, timeout=PATIENCE
        )
        http = httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE)
        try:
            with client, http:
                until(lambda: answers(http))
                yield Running(server, client, http)
        finally:
            server.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def answers(http: httpx.Client) -> bool:
    """Whether the server answers by now."""
    try:
        return http.get("../health").status_code == 200
    except httpx.ConnectError:
        return False


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread will do."""
    pause = threading.Event()
    for _ in range(PATIENCE * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it has not happened")


class Gate:
    """Makes each step of an engine wait until the test allows it, and notes what was asked for.

    Attributes:
        steps: of each step that began, how many new tokens each sequence had.
        done: how many have ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps: list[list[int]] = []
        self.done = 0
        self._allowed = threading.Semaphore(0)
        self._is_open = False
        step = engine.step

        def gated(requests: Any, **options: Any) -> Any:
            self.steps.append([len(ids) for _, ids in requests])
            if not self._is_open:
                assert self._allowed.acquire(timeout=PATIENCE)
            try:
                return step(requests, **options)
            finally:
                self.done += 1

        engine.step = gated  # type: ignore[method-assign]

    def release(self, steps: int = 1) -> None:
        """Let so many steps happen."""
        for _ in range(steps):
            self._allowed.release()

    def allow(self, steps: int) -> None:
        """Let so many steps happen, and wait until the one after them has begun."""
        wanted = max(len(self.steps), 1) + steps
        self.release(steps)
        until(lambda: len(self.steps) >= wanted)

    def open(self) -> None:
        """Let all steps happen."""
        self._is_open = True
        self.release(1000)
