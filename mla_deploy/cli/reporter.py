"""What a command says: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import click

from mla_deploy.errors import MlaError, UsageError
from mla_deploy.progress import Progress

P = ParamSpec("P")


class Reporter:
    """Where a command's results, messages and progress go."""

    def __init__(self, *, json: bool = False, debug: bool = False) -> None:
        self.json = json
        self.debug = debug

    def result(self, values: Mapping[str, Any], text: str) -> None:
        """The result of the command: `values` as one JSON object with --json, else `text`."""
        click.echo(json.dumps(_plain(values), indent=2) if self.json else text)

    def note(self, text: str) -> None:
        """A message to the person at the terminal."""
        click.echo(text, err=True)

    def kernels(self, chosen: object, asked: str | None) -> None:
        """Say once why the native kernels are not in use, where the choice was left to us."""
        if asked in (None, "auto") and str(chosen).startswith("stock"):
            self.note(f"kernels: {chosen}")

    def failure(self, error: MlaError, exit_code: int, kind: str | None = None) -> None:
        """Why the command stops."""
        self.note(f"mla-deploy: {error}")
        if self.json:
            described = {
                "kind": kind or type(error).__name__,
                "what": error.what,
                "found": error.found,
                "allowed": error.allowed,
                "next": error.hint,
                "exit_code": exit_code,
            }
            click.echo(json.dumps({"error": described}, indent=2))

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A progress bar while the block runs; silent where standard error is no terminal."""
        if not sys.stderr.isatty():
            yield _ignore
            return
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),  # it may hold the name of a file
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}", markup=False),
        )
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None, what="")

            def move(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, what=what)

            yield move


def _ignore(done: int, total: int, what: str) -> None:
    """The progress of those who do not look."""


def reporting(function: Callable[Concatenate[Reporter, P], None]) -> Callable[P, None]:
    """Give a command --json and --debug, and a `Reporter` as its first argument."""

    def store(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.find_object(Reporter), str(parameter.name), True)

    wrapped = click.make_pass_decorator(Reporter)(function)
    for name, text in (
        ("debug", "Show a traceback with every error."),
        ("json", "Print one JSON object on standard output."),
    ):
        # Eager: known before the other options are read, so that their errors obey it.
        option = click.option(
            f"--{name}", is_flag=True, is_eager=True, expose_value=False, callback=store, help=text
        )
        wrapped = option(wrapped)
    return wrapped


def errors_of_click(error: click.ClickException) -> MlaError:
    """What click found wrong with the arguments, in our form."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = None if context is None else f"see `{context.command_path} --help`"
    return UsageError(error.format_message(), hint=hint)


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
