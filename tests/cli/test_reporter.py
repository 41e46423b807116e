"""Results as JSON and as text, tables, sizes."""

from __future__ import annotations

import json
import math

import click
import pytest

from mla_deploy.cli import table
from mla_deploy.cli.options import Depths, MemorySize
from mla_deploy.cli.reporter import Reporter


def test_what_json_cannot_say_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(json=True).result({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": -math.inf}}, "")
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_a_table_has_its_figures_to_the_right() -> None:
    assert table.table(("name", "bytes"), [("a", "1"), ("longer", "1,000")]).splitlines() == [
        "  name    bytes",
        "  a           1",
        "  longer  1,000",
    ]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994_999, "9.99 MB"),
        (9_995_000, "10.0 MB"),
        (99_960_000_000, "100 GB"),
        (31_412_968_448, "31.4 GB"),
    ],
)
def test_sizes_have_three_digits(number: int, expected: str) -> None:
    assert table.size(number) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("7.5 GiB", int(7.5 * 2**30)), ("512mb", 512 * 10**6), ("1000", 1000)],
)
def test_memory_sizes(text: str, expected: int) -> None:
    assert MemorySize().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["8XB", "GB", "-1GB", "", "8GB8"])
def test_other_memory_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="8GB"):
        MemorySize().convert(text, None, None)


def test_depths_are_sorted_and_taken_once() -> None:
    assert Depths().convert("512, 0,512,8k", None, None) == (0, 512, 8192)
    for text in ("", "1,", "-1", "1.5", "a", "k", "2kk"):
        with pytest.raises(click.BadParameter, match="list of depths"):
            Depths().convert(text, None, None)
