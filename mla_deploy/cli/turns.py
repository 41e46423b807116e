"""What a user says in `chat`: lines become turns and commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import click

from mla_deploy.cli.interrupts import ControlC

PROMPT, MORE = "> ", "... "
BLOCK = '"""'


class _LeftLineError(Exception):
    """Ctrl-C, while a line is typed."""


@dataclass(frozen=True)
class Turn:
    """Something said.

    Attributes:
        text: of the turn, or what stands behind the command.
        command: such as `/undo`; None: it is said to the model.
    """

    text: str
    command: str | None = None


def is_interactive() -> bool:
    """Whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_turns(control_c: ControlC | None) -> Iterator[Turn]:
    """Turns to the end of standard input; empty ones are left out.

    A backslash at the end of a line goes on with the next; so does a line that begins with three
    quotation marks, up to the line that ends with three.

    Args:
        control_c: at a terminal, where prompts are shown and lines edited; it leaves a line.
    """
    read = _lines() if control_c is None else _terminal(control_c)
    while True:
        try:
            turn = _turn(read)
        except EOFError:
            return
        except _LeftLineError:
            click.echo("\n(Ctrl-D or /exit ends)", err=True)
            continue
        if turn.text or turn.command:
            yield turn


def _turn(read: Callable[[str], str]) -> Turn:
    line = read(PROMPT)
    if line.lstrip().startswith(BLOCK):
        return Turn(_block(line.lstrip().removeprefix(BLOCK), read))
    if line.startswith("/"):
        command, _, argument = line.strip().partition(" ")
        return Turn(argument.strip(), command)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_more(read, at_the_end=""))
    return Turn("\n".join(lines).strip())


def _block(line: str, read: Callable[[str], str]) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(BLOCK):
        lines.append(_more(read, at_the_end=BLOCK))
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip("\n")


def _more(read: Callable[[str], str], at_the_end: str) -> str:
    """The next line; the end of the input also ends what was begun."""
    try:
        return read(MORE)
    except EOFError:
        return at_the_end


def _terminal(control_c: ControlC) -> Callable[[str], str]:
    with contextlib.suppress(ImportError):  # not part of every Python
        import readline  # noqa: F401 - input() edits lines and remembers them with it

    def leave() -> NoReturn:
        raise _LeftLineError

    def read(prompt: str) -> str:
        with control_c.does(leave):
            return input(prompt)

    return read


def _lines() -> Callable[[str], str]:
    from mla_deploy.evaluate.text import decode_text

    def read(_: str) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_text(line, "standard input").rstrip("\r\n")

    return read
