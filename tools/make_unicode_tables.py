"""Writes later_unicode.inc and later_marks.inc, which are committed: run it when they must change.

    python tools/make_unicode_tables.py

It needs Python 3.11, whose unicodedata is of Unicode 14; the package unicodedata2, which knows the
latest; and the package tokenizers, the oracle.

- later_unicode.inc: code points whose general category Oniguruma (the regular expressions of
  tokenizers) knows better than PCRE2 with Unicode 14, each with a stand-in that PCRE2 does know:
  of that category, as long in UTF-8, and as near as can be, so of the same script and range.
- later_marks.inc: what Unicode has given a combining class or a canonical composition since the
  Unicode of the oracle's normalizer, which is older than that of its regular expressions.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import unicodedata2
from tokenizers import Regex, normalizers

TEXT = Path(__file__).resolve().parents[1] / "runtime" / "csrc" / "text"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
CATEGORIES = (
    "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn"
)


def oracle_categories() -> dict[int, str]:
    everything = "".join(map(chr, CODE_POINTS))
    return {
        ord(char): category
        for category in CATEGORIES.split()
        for char in normalizers.Replace(Regex(rf"[^\p{{{category}}}]+"), "").normalize_str(
            everything
        )
    }


def utf8_length(code: int) -> int:
    return len(chr(code).encode())


def stand_in(code: int, category: str, known: dict[int, str]) -> int:
    for distance in range(1, 0x110000):
        for near in (code - distance, code + distance):
            if known.get(near) == category and utf8_length(near) == utf8_length(code):
                return near
    raise ValueError(f"nothing stands in for U+{code:04X}")


def later_rows() -> Iterable[str]:
    oracle = oracle_categories()
    known = {c: unicodedata.category(chr(c)) for c in CODE_POINTS}
    same = {c: category for c, category in known.items() if oracle[c] == category}
    ranges: list[list[int]] = []
    for code in CODE_POINTS:
        if code in same:
            continue
        if ranges and ranges[-1][1] == code - 1 and oracle[ranges[-1][0]] == oracle[code]:
            ranges[-1][1] = code
        else:
            ranges.append([code, code, stand_in(code, oracle[code], same)])
    return [f"{{0x{a:x}, 0x{b:x}, 0x{s:x}}}," for a, b, s in ranges]


NFD = normalizers.NFD().normalize_str


def is_mark(code: int) -> bool:
    """Whether the oracle moves the character past another mark."""
    char, value = chr(code), unicodedata2.combining(chr(code))
    if value > 1:
        return NFD(f"x{char}\u0334") == f"x\u0334{char}"  # which is of class 1
    return value == 1 and NFD(f"x\u0345{char}") == f"x{char}\u0345"  # class 240


def later_marks() -> Iterable[str]:
    later, known_parts, later_parts = set(), set(), set()
    for code in CODE_POINTS:
        char, spelled = chr(code), unicodedata2.decomposition(chr(code))
        if spelled and not spelled.startswith("<"):
            parts = {int(part, 16) for part in spelled.split()}
            if NFD(char) != char:
                known_parts |= parts
                continue
            later.add(code)
            later_parts |= parts
        if unicodedata2.combining(char) and not is_mark(code):
            later.add(code)
    later |= {part for part in later_parts - known_parts if not is_mark(part)}
    ranges: list[list[int]] = []
    for code in sorted(later):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return [f"{{0x{a:x}, 0x{b:x}}}," for a, b in ranges]


def write(name: str, tables: dict[str, Iterable[str]]) -> None:
    head = "// Written by tools/make_unicode_tables.py: change that, not this."
    lines = [head, "// clang-format off"]
    for declaration, rows in tables.items():
        lines.append(f"constexpr {declaration}[] = {{")
        line = "   "
        for row in rows:
            if len(line) + len(row) >= 100:
                lines.append(line)
                line = "   "
            line += " " + row
        lines += [line, "};"]
    (TEXT / name).write_text("\n".join([*lines, "// clang-format on"]) + "\n")


def main() -> None:
    if unicodedata.unidata_version != "14.0.0":
        raise SystemExit(f"needs Unicode 14.0.0, has {unicodedata.unidata_version}: Python 3.11")
    write("later_unicode.inc", {"Later kLater": later_rows()})
    write("later_marks.inc", {"LaterMarks kLaterMarks": later_marks()})


if __name__ == "__main__":
    main()
