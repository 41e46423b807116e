"""What is closed by `close` or at the end of a `with`."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import TypeVar

Closed = TypeVar("Closed", bound="Closing")


class Closing(abc.ABC):
    """Leaving a `with` closes it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what it holds; a second time does nothing."""

    def __enter__(self: Closed) -> Closed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
