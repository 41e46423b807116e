"""Ctrl-C in a program that goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ControlC:
    """Within a `with` of it Ctrl-C does what `does` says at the moment, and otherwise nothing."""

    def __init__(self) -> None:
        self._action: Callable[[], None] | None = None

    def __enter__(self) -> ControlC:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def does(self, action: Callable[[], None]) -> Iterator[None]:
        """Within a `with` of this, Ctrl-C calls `action`, in the main thread."""
        self._action = action
        try:
            yield
        finally:
            self._action = None

    def _handle(self, *_: object) -> None:
        if self._action is not None:
            self._action()
