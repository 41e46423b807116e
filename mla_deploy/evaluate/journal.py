"""What an evaluation has finished, so that the same command goes on where it was stopped.

A file of JSON lines: the first says what is evaluated, every other holds one finished item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from mla_deploy.errors import OutputError
from mla_deploy.job import difference
from mla_deploy.output import writing


class Journal:
    """Remembers finished items by key, in a file if it is given one.

    Args:
        path: None remembers nothing beyond this object.
        job: what is evaluated, of `mla_deploy.job`.

    Raises:
        OutputError: the file is of another job, is no journal, or cannot be written.
    """

    def __init__(self, path: Path | None = None, job: Mapping[str, Any] | None = None) -> None:
        self._known: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if path is None:
            return
        is_new = not path.exists() or path.stat().st_size == 0
        if not is_new:
            self._read(path, job or {})
        with writing(path):
            self._file = path.open("a", encoding="utf-8")
            if is_new:
                self._file.write(_head(job or {}) + "\n")
                self._file.flush()

    @property
    def resumed(self) -> int:
        """Items that were known from the file or have been finished since."""
        return len(self._known)

    def item(self, key: str, compute: Callable[[], Any]) -> Any:
        """The item of that key, computed and noted if it is not known.

        Items are JSON: numbers, strings, lists and objects.
        """
        if key not in self._known:
            value = compute()
            self._known[key] = value
            if self._file is not None:
                self._file.write(json.dumps({"key": key, "value": value}) + "\n")
                self._file.flush()
        return self._known[key]

    def _read(self, path: Path, job: Mapping[str, Any]) -> None:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            lines = [""]
        if lines[0] != _head(job):
            raise OutputError(
                f"{path} belongs to another evaluation",
                found=_difference(lines[0], job),
                allowed="the file of an interrupted run of the same command",
                hint="name another file for --resume, or remove this one",
            )
        whole = lines[1:]
        for line in whole:
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):  # cut off by a kill
                continue
        if whole and whole[-1]:  # no line end: close the cut-off line before going on
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write("\n")


def _head(job: Mapping[str, Any]) -> str:
    return json.dumps({"job": job}, sort_keys=True)


def _difference(head: str, job: Mapping[str, Any]) -> str:
    try:
        return difference(json.loads(head)["job"], job)
    except (ValueError, KeyError, TypeError, AttributeError):
        return head[:200]
