"""Writes later_unicode.inc and nfc_tables.inc, which are committed: run it when they must change.

    python runtime/csrc/text/make_tables.py

It needs Python 3.11, whose unicodedata is of Unicode 14, and the tokenizers package, the oracle.

- later_unicode.inc: code points whose general category Oniguruma (the regular expressions of
  tokenizers) knows better than PCRE2 with Unicode 14, each with a stand-in that PCRE2 does know:
  of that category, as long in UTF-8, and as near as can be, so of the same script and range.
- nfc_tables.inc: canonical decomposition, composition and combining classes, as far as the
  normalizer of tokenizers has them: it is of an older Unicode.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, normalizers

HERE = Path(__file__).parent
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


NFC = normalizers.NFC().normalize_str
NFD = normalizers.NFD().normalize_str


def combining_class(code: int) -> int:
    """0 where the oracle does not move the character past another mark."""
    value = unicodedata.combining(chr(code))
    if not value:
        return 0
    later, before = chr(code), "\u0334"  # of class 1
    if value == 1:
        later, before = "\u0345", chr(code)  # class 240
    return value if NFD(f"x{later}{before}") == f"x{before}{later}" else 0


def full_decomposition(code: int) -> list[int]:
    text = NFD(chr(code))
    return [] if text == chr(code) else list(map(ord, text))


def is_hangul(code: int) -> bool:
    return 0xAC00 <= code <= 0xD7A3


def decomposition_rows() -> Iterable[str]:
    for code in CODE_POINTS:
        if not is_hangul(code) and (parts := full_decomposition(code)):
            padded = parts + [0] * (4 - len(parts))
            yield f"{{0x{code:x}, {{{', '.join(f'0x{p:x}' for p in padded)}}}}},"


def compositions() -> dict[tuple[int, int], int]:
    pairs = {}
    for code in CODE_POINTS:
        spelled = unicodedata.decomposition(chr(code))
        if is_hangul(code) or not spelled or spelled.startswith("<"):
            continue
        parts = [int(part, 16) for part in spelled.split()]
        if len(parts) == 2 and NFC("".join(map(chr, parts))) == chr(code):
            pairs[parts[0], parts[1]] = code
    return pairs


def class_rows() -> Iterable[str]:
    ranges: list[list[int]] = []
    for code in CODE_POINTS:
        if not (value := combining_class(code)):
            continue
        if ranges and ranges[-1][1] == code - 1 and ranges[-1][2] == value:
            ranges[-1][1] = code
        else:
            ranges.append([code, code, value])
    return [f"{{0x{a:x}, 0x{b:x}, {v}}}," for a, b, v in ranges]


def unstable_rows() -> Iterable[str]:
    """Whatever may change in NFC, or change what stands before it."""
    seconds = {second for _, second in compositions()}
    seconds |= set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # Hangul vowels and finals
    ranges: list[list[int]] = []
    for code in CODE_POINTS:
        char = chr(code)
        stable = NFC(char) == char and not combining_class(code)
        if stable and code not in seconds:
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return [f"{{0x{a:x}, 0x{b:x}}}," for a, b in ranges]


def write(name: str, tables: dict[str, Iterable[str]]) -> None:
    lines = ["// Written by make_tables.py: change that, not this.", "// clang-format off"]
    for declaration, rows in tables.items():
        lines.append(f"constexpr {declaration}[] = {{")
        line = "   "
        for row in rows:
            if len(line) + len(row) >= 100:
                lines.append(line)
                line = "   "
            line += " " + row
        lines += [line, "};"]
    (HERE / name).write_text("\n".join([*lines, "// clang-format on"]) + "\n")


def main() -> None:
    if unicodedata.unidata_version != "14.0.0":
        raise SystemExit(f"needs Unicode 14.0.0, has {unicodedata.unidata_version}: Python 3.11")
    write("later_unicode.inc", {"Later kLater": later_rows()})
    pairs = sorted(compositions().items())
    write(
        "nfc_tables.inc",
        {
            "Decomposition kDecompositions": decomposition_rows(),
            "Composition kCompositions": [f"{{0x{a:x}, 0x{b:x}, 0x{c:x}}}," for (a, b), c in pairs],
            "CombiningClass kClasses": class_rows(),
            "Unstable kUnstable": unstable_rows(),
        },
    )


if __name__ == "__main__":
    main()
