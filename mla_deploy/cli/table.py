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
    return "\n".join(
        f"{' ' * indent}{name.ljust(width)}  {value}".rstrip() for name, value in entries
    )


def count(number: int) -> str:
    """1234567 as `1,234,567`."""
    return f"{number:,}"


def parameters(number: int) -> str:
    """A number of parameters: `15.7 B`, `5.24 M`."""
    return _three_digits(number, (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)), "")


def size(number: float) -> str:
    """Bytes in decimal units: `9.31 GB`."""
    return _three_digits(
        number, (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)), " B"
    )


def _three_digits(number: float, units: Sequence[tuple[str, int]], plain: str) -> str:
    for unit, factor in units:
        if number >= factor:
            value = number / factor
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{number:.0f}{plain}"
