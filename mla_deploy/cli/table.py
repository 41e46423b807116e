"""Plain tables, units: the same in a terminal, in a file and in an issue."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 2) -> str:
    """Columns side by side: the first to the left, the others, figures, to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append((" " * indent + "  ".join((first, *others))).rstrip())
    return "\n".join(lines)


def pairs(entries: Sequence[tuple[str, str]], indent: int = 2) -> str:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in entries)
    return "\n".join(f"{' ' * indent}{name.ljust(width)}  {value}".rstrip() for name, value in entries)


def count(number: int) -> str:
    """1234567 as `1,234,567`."""
    return f"{number:,}"


def billions(number: int) -> str:
    """A number of parameters, to three digits: `15.7 B`, `5.23 M`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def size(number: float) -> str:
    """Bytes in decimal units: `9.31 GB`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
