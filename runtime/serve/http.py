"""Hosts, bodies, streams, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mla_deploy.runtime.serve.errors import ApiError
from mla_deploy.runtime.serve.job import Job, Piece

MOST_BODY_BYTES = 4 << 20
BODY_SECONDS = 30
SILENT_SECONDS = 15
"""After which a stream says that it is still there: clients and proxies give up on a silent one,
and a long prompt takes minutes on a small machine."""

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]*)?", re.ASCII)

Result = TypeVar("Result")


def host_name(header: str) -> str | None:
    """The name or address in a Host header; None where it is anything else than that and a port."""
    match = _HOST.fullmatch(header.lower())
    return None if match is None else match[1] or match[2]


async def read_body(request: Request) -> bytes:
    """The JSON of a request.

    Raises:
        ApiError: it is of another type, too large, or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers send others for any page, without asking
        raise ApiError(415, f"the body must be application/json; found: {kind or 'no type'}")
    try:
        return await asyncio.wait_for(_read(request), BODY_SECONDS)
    except (asyncio.TimeoutError, ClientDisconnect):
        raise ApiError(408, "the body did not arrive") from None


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            message = f"the body is too large; allowed: {MOST_BODY_BYTES} bytes"
            raise ApiError(413, message)
    return bytes(body)


class Inbox:
    """Where the pieces of a job wait for the event loop that sends them."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._filled = asyncio.Event()

    def put(self, piece: Piece) -> None:
        """The listener of a job; called in the event loop."""
        self._pieces.append(piece)
        self._filled.set()

    async def filled(self, seconds: float) -> bool:
        """Wait for a piece; False: none came in time."""
        try:
            await asyncio.wait_for(self._filled.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    async def take(self) -> Piece:
        """All that has come since the last time, as one piece: a slow client gets larger ones."""
        await self._filled.wait()
        self._filled.clear()
        pieces, self._pieces = self._pieces, []
        if len(pieces) == 1:
            return pieces[0]
        last = pieces[-1]
        text = "".join(piece.text for piece in pieces)
        tokens = sum(piece.tokens for piece in pieces)
        return Piece(text, tokens, last.finish_reason, last.error, last.cached_tokens)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Do the work; None, and it is given up, if the client leaves before its end."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; the job that they tell of is cancelled if the client leaves.

    None stands for a comment, which clients skip.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any] | str | None], job: Job) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        finally:
            self._job.cancel()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for event in self._events:
            text = as_json(event) if isinstance(event, dict) else event
            body = ":\n\n" if text is None else f"data: {text}\n\n"
            await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_json(values: dict[str, Any]) -> str:
    """Compact, with letters as they are."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))
