"""The journal: goes on where a run was stopped, and only with the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla_deploy.errors import OutputError
from mla_deploy.evaluate.journal import Journal


def never() -> Any:
    raise AssertionError("this was finished before")


def test_finished_items_are_not_computed_again(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    first = Journal(file, {"model": "a"})
    assert first.item("one", lambda: [1.5, 2]) == [1.5, 2]
    assert first.item("one", never) == [1.5, 2]
    second = Journal(file, {"model": "a"})
    assert second.resumed == 1
    assert second.item("one", never) == [1.5, 2]
    assert second.item("two", lambda: {"x": True}) == {"x": True}
    assert Journal(file, {"model": "a"}).item("two", never) == {"x": True}


@pytest.mark.parametrize("kept", [1, 10, 25])
def test_a_line_that_a_kill_cut_off_is_done_again(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "eval.jsonl"
    journal = Journal(file, {})
    journal.item("one", lambda: 1)
    whole = file.read_text()
    journal.item("two", lambda: 2)
    file.write_text(file.read_text()[: len(whole) + kept])
    again = Journal(file, {})
    assert again.item("one", never) == 1
    assert again.item("two", lambda: 3) == 3
    assert Journal(file, {}).item("two", never) == 3


def test_the_journal_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    Journal(file, {"model": "a"}).item("one", lambda: 1)
    with pytest.raises(OutputError, match="another evaluation"):
        Journal(file, {"model": "b"})


@pytest.mark.parametrize("content", [b"my notes\n", b"\xff\xfe\x00", b"{}\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(OutputError, match="another evaluation"):
        Journal(file, {})
    assert file.read_bytes() == content


def test_without_a_file_it_remembers_for_itself() -> None:
    journal = Journal()
    assert journal.item("one", lambda: 1) == 1
    assert journal.item("one", never) == 1
