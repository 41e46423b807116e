"""Stopping calls from another thread."""

from __future__ import annotations

from mla_deploy.errors import SessionError
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.native import require_engine


class Cancellation:
    """A flag that one thread raises to stop the calls of others that were given it.

    A generation that is stopped so ends with the reason `cancelled`; a prefill, decode or step
    raises a SessionError, and its sessions are as they were. Once raised the flag stays raised:
    make one for each request.
    """

    def __init__(self) -> None:
        require_engine()
        self.core = _runtime.Cancellation()

    def request(self) -> None:
        """Stop the calls, in the midst of the graph too. Returns at once."""
        self.core.request()

    @property
    def requested(self) -> bool:
        """Whether `request` was called."""
        return self.core.requested


class CancelledError(SessionError):
    """A call that a `Cancellation` stopped."""

    def __init__(self) -> None:
        super().__init__("the call was cancelled")
