"""Errors in the form of OpenAI's protocol."""

from __future__ import annotations

from typing import Any

from mla_deploy.errors import MlaError


class ApiError(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP.
        message: what was wrong, what was found and what is allowed, for the client to read.
        param: the field that was wrong.
        code: what programs tell errors apart by.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        inside = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": inside}


def in_one_line(error: MlaError) -> str:
    """An `MlaError` as a message."""
    parts = (("found", error.found), ("allowed", error.allowed), ("next", error.hint))
    return "; ".join([error.what, *(f"{label}: {text}" for label, text in parts if text)])
