"""The folder that an output grows in, and what becomes of what was at its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.errors import OutputError
from mla_deploy.output import Output, check_output
from mla_deploy.workspace import claimed, workspace

JOB = {"model": "a"}


def output(tmp_path: Path, *, force: bool = False) -> Output:
    return check_output(
        tmp_path / "source", tmp_path / "out", lambda old: (old / "ours").exists(), force=force
    )


def old_result(tmp_path: Path, name: str = "ours") -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("old")
    return out


def write(file: Path, text: str, error: type[BaseException] | None = None) -> None:
    """And fail then, if an error is given."""
    file.write_text(text)
    if error is not None:
        raise error


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("job", [None, JOB])
def test_the_folder_takes_its_name_when_it_is_whole(job: Any, tmp_path: Path) -> None:
    with workspace(output(tmp_path), job, scratch=("notes-*",)) as folder:
        (folder / "ours").write_text("new")
        (folder / "notes-1").touch()
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path) == {"out/ours": "new"}


@pytest.mark.parametrize("force", [False, True])
def test_what_came_to_the_output_meanwhile_stays(force: bool, tmp_path: Path) -> None:
    chosen = output(tmp_path, force=force)
    message = "did not write it" if force else "exists already"
    with pytest.raises(OutputError, match=message), workspace(chosen, JOB) as folder:
        write(folder / "ours", old_result(tmp_path, "precious").name)
    found = contents(tmp_path)
    assert found.pop("out.partial/job.json")
    assert found == {"out/precious": "old", "out.partial/ours": "out"}


def test_an_old_result_goes_only_for_a_new_one(tmp_path: Path) -> None:
    old_result(tmp_path)
    with workspace(output(tmp_path, force=True)) as folder:
        (folder / "new").touch()
        assert contents(tmp_path / "out") == {"ours": "old"}
    assert contents(tmp_path) == {"out/new": ""}


def test_an_old_result_comes_back_where_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_result(tmp_path)
    finished = tmp_path / "finished"
    finished.mkdir()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == finished:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        output(tmp_path, force=True).publish(finished)
    assert contents(tmp_path) == {"out/ours": "old"}
    assert sorted(os.listdir(tmp_path)) == ["finished", "out"]


@pytest.mark.parametrize("job", [None, JOB])
def test_a_second_run_is_refused_and_the_first_one_goes_on(job: Any, tmp_path: Path) -> None:
    with workspace(output(tmp_path), job) as folder:
        (folder / "ours").touch()
        for second in (None, JOB):
            with (
                pytest.raises(OutputError, match="another run is writing"),
                workspace(output(tmp_path), second),
            ):
                pass
    assert contents(tmp_path) == {"out/ours": ""}


def test_a_run_that_ends_while_another_one_locks_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is then on a file that is in the output, or gone."""
    partial = tmp_path / "out.partial"

    def late(*_: object) -> None:
        partial.rename(tmp_path / "out")

    monkeypatch.setattr("mla_deploy.workspace.fcntl.flock", late)
    with pytest.raises(OutputError, match="another run"), claimed(tmp_path / "out", JOB):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["shard", ".notes"])
def test_after_an_error_finished_work_stays(
    name: str, error: type[BaseException], tmp_path: Path
) -> None:
    said: list[str] = []
    folder = tmp_path / "out.partial"
    with pytest.raises(error), claimed(tmp_path / "out", JOB, say=said.append):
        write(folder / name, "done", error)
    if name == "shard":
        assert f"kept in {folder}" in said[0]
        with claimed(tmp_path / "out", JOB):
            assert (folder / name).exists()
    else:
        assert not said
        assert os.listdir(tmp_path) == []


def test_after_an_error_work_that_cannot_be_resumed_goes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(output(tmp_path)) as folder:
        write(folder / "graph", "done", RuntimeError)
    assert os.listdir(tmp_path) == []


def left_by_a_kill(tmp_path: Path, job: Any, name: str) -> Path:
    """As if no code had run any more."""
    partial = tmp_path / "out.partial"
    with claimed(tmp_path / "out", job):
        (partial / name).touch()
    return partial


@pytest.mark.parametrize(("job", "name"), [(None, "graph"), (JOB, ".notes")])
def test_what_a_killed_run_left_of_no_use_is_taken_away(
    job: Any, name: str, tmp_path: Path
) -> None:
    partial = left_by_a_kill(tmp_path, job, name)
    with claimed(tmp_path / "out", {"model": "b"}):
        assert os.listdir(partial) == ["job.json"]


@pytest.mark.parametrize("job", [None, {"model": "b"}])
def test_unfinished_work_of_another_job_is_left_alone(job: Any, tmp_path: Path) -> None:
    partial = left_by_a_kill(tmp_path, JOB, "shard")
    with pytest.raises(OutputError, match="another command"), claimed(tmp_path / "out", job):
        pass
    with claimed(tmp_path / "out", JOB):
        assert (partial / "shard").exists()


@pytest.mark.parametrize("job", [None, JOB])
def test_a_folder_of_somebody_elses_is_left_alone(job: Any, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".precious").write_text("mine")
    for _ in range(2):
        with pytest.raises(OutputError, match="another command"), claimed(tmp_path / "out", job):
            pass
        assert contents(partial) == {".precious": "mine"}
