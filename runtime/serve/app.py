"""The routes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_deploy.errors import MlaError, SessionError, UsageError
from mla_deploy.runtime.engine import Engine
from mla_deploy.runtime.serve import http
from mla_deploy.runtime.serve.answers import Answer, ChatAnswer, CompletionAnswer, usage
from mla_deploy.runtime.serve.errors import ApiError, in_one_line
from mla_deploy.runtime.serve.http import EventStream, Inbox, host_name, read_body, while_connected
from mla_deploy.runtime.serve.job import Job, Piece
from mla_deploy.runtime.serve.scheduler import STOPPED, FullError, Scheduler, StoppedError
from mla_deploy.runtime.serve.schema import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    Sampling,
    parse,
)

RETRY_SECONDS = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the server is told.

    Attributes:
        model_name: what the model is called in requests.
        parallel: sequences that advance together.
        queue: requests that may wait beyond that.
        api_key: what requests must bring; None: nothing.
        hosts: names that a request may call the server by; None: any.
    """

    model_name: str
    parallel: int
    queue: int
    api_key: str | None = None
    hosts: frozenset[str] | None = None


class Service:
    """One engine behind the routes. `scheduler` lives as long as the app runs."""

    scheduler: Scheduler

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._created = int(time.time())
        self._tokenizer = engine.tokenizer  # or an error now, not with the first request

    def app(self) -> FastAPI:
        """The application."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self.scheduler = Scheduler(
                self._engine,
                parallel=self._settings.parallel,
                queue=self._settings.queue,
                call=asyncio.get_running_loop().call_soon_threadsafe,
            )
            yield

        app = FastAPI(lifespan=lifespan, openapi_url=None)
        checks = [Depends(self._check_host), Depends(self._check_key)]

        def add(method: str, path: str, route: Callable[..., Any]) -> None:
            app.add_api_route(
                path, route, methods=[method], dependencies=checks, response_model=None
            )

        app.add_api_route("/health", self._health, methods=["GET"], response_model=None)
        add("GET", "/v1/models", self._models)
        add("GET", "/v1/models/{name:path}", self._one_model)
        add("POST", "/v1/completions", self._completions)
        add("POST", "/v1/chat/completions", self._chat)
        app.add_exception_handler(ApiError, _refused)
        app.add_exception_handler(HTTPException, _not_a_route)
        app.add_exception_handler(Exception, _failed)
        return app

    async def stop(self) -> None:
        """End all requests: for whoever runs the app, before it waits for its connections."""
        await asyncio.to_thread(self.scheduler.stop)

    async def _check_host(self, request: Request) -> None:
        """A page of another site whose name was made to lead here calls us by that name."""
        hosts = self._settings.hosts
        if hosts is not None and host_name(request.headers.get("host", "")) not in hosts:
            raise ApiError(403, "the server answers to its own address only, unless it has a key")

    async def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        if key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise ApiError(
                401, "send the server's key as `Authorization: Bearer KEY`", code="invalid_api_key"
            )

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._described()]}

    async def _one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._described()

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "mla-deploy",
        }

    async def _completions(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        prompt = asked.one_prompt
        ids = (
            await self._ids(lambda: self._tokenizer.encode(prompt), "prompt")
            if isinstance(prompt, str)
            else prompt
        )
        return await self._answer(request, asked, ids, DEFAULT_COMPLETION_TOKENS, CompletionAnswer)

    async def _chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        messages = [message.as_template_reads_it() for message in asked.messages]
        ids = await self._ids(lambda: self._tokenizer.encode_chat(messages), "messages")
        limit = self._engine.bundle.manifest.model.max_position_embeddings
        return await self._answer(request, asked, ids, limit, ChatAnswer)

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        if self.scheduler.full:  # before its body takes memory
            raise _full()
        asked = parse(kind, await read_body(request))
        if asked.model is not None:
            self._check_model(asked.model)
        return asked

    def _check_model(self, name: str) -> None:
        ours = self._settings.model_name
        if name != ours:
            message = f"there is no model {name[:80]!r} here; there is {ours!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _ids(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        """Token ids, made in another thread: a long text takes its time."""
        try:
            return await asyncio.to_thread(encode)
        except MlaError as error:
            # Where the bundle lies is not for clients.
            message = in_one_line(error).replace(
                str(self._engine.bundle.path), self._settings.model_name
            )
            raise ApiError(400, message, param=param) from None

    async def _answer(
        self,
        request: Request,
        asked: Sampling,
        ids: list[int],
        default_limit: int,
        kind: type[Answer],
    ) -> Response:
        options = asked.options(asked.token_limit or default_limit)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        answer = kind(self._settings.model_name, with_usage=with_usage)
        inbox = Inbox()
        try:
            job = self.scheduler.submit(ids, options, inbox.put)
        except FullError:
            raise _full() from None
        except StoppedError:
            raise _of_job(STOPPED) from None
        except SessionError as error:
            raise ApiError(
                400, in_one_line(error), param="prompt", code="context_length_exceeded"
            ) from None
        except MlaError as error:
            raise ApiError(400, in_one_line(error), param="prompt") from None
        if asked.stream:
            return EventStream(_events(answer, inbox, len(ids), with_usage), job)
        return await _whole(answer, inbox, len(ids), job, request)


async def _whole(
    answer: Answer, inbox: Inbox, prompt_tokens: int, job: Job, request: Request
) -> Response:
    async def collect() -> Response:
        texts, made = [], 0
        while True:
            piece = await inbox.take()
            texts.append(piece.text)
            made += piece.tokens
            if piece.error is not None:
                raise _of_job(piece.error)
            if piece.finish_reason is not None:
                used = usage(prompt_tokens, made, piece.cached_tokens)
                return JSONResponse(answer.whole("".join(texts), piece.finish_reason, used))

    try:
        return await while_connected(request.receive, collect()) or Response()
    finally:
        job.cancel()


async def _events(
    answer: Answer, inbox: Inbox, prompt_tokens: int, with_usage: bool
) -> AsyncIterator[dict[str, Any] | str | None]:
    first = answer.first()
    if first is not None:
        yield first
    piece, made = Piece(), 0
    while not piece.is_last:
        while not await inbox.filled(http.SILENT_SECONDS):
            yield None
        piece = await inbox.take()
        made += piece.tokens
        if piece.error is not None:
            yield _of_job(piece.error).body
            return
        if piece.text or piece.is_last:
            yield answer.chunk(piece.text, piece.finish_reason)
    if with_usage:
        yield answer.last(usage(prompt_tokens, made, piece.cached_tokens))
    yield "[DONE]"


def _full() -> ApiError:
    return ApiError(
        503,
        "the server has as many requests as it takes; try again later",
        code="server_full",
        retry_after=RETRY_SECONDS,
    )


def _of_job(error: MlaError) -> ApiError:
    """What a client is told of a request that failed; the rest is for the log."""
    if error is STOPPED:
        return ApiError(503, "the server is stopping", code="server_stopping")
    if isinstance(error, UsageError):
        return ApiError(400, in_one_line(error))
    log.error("a request failed: %s", in_one_line(error))
    return ApiError(500, "the model failed on this request", code="model_failed")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _not_a_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path[:80]}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _failed(_: Request, error: Exception) -> Response:
    """A bug of ours; the traceback is in the log."""
    return JSONResponse(ApiError(500, "the server failed").body, 500)
