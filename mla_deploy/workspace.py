"""Where an output grows: a folder `OUT.partial` beside it, which takes its name when it is whole.

One run at a time writes there. A run that was killed leaves the folder, and so does one that failed
after it had finished something: the same command goes on from there. Work that nobody can go on
with, such as an export's, goes with the run, or with the next run if that one was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mla_deploy.errors import OutputError
from mla_deploy.job import difference
from mla_deploy.output import Output, writing

JOB_FILE = "job.json"


@contextmanager
def workspace(
    output: Output,
    job: Mapping[str, Any] | None = None,
    *,
    scratch: Iterable[str] = (),
    say: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """The partial folder, which becomes the output at the end of the block.

    Args:
        job, say: as of `claimed`.
        scratch: patterns of files that only unfinished work needs. They go when the output is in
            place, so that until then nothing is lost.

    Raises:
        OutputError: as of `claimed`, or something has appeared at the output since it was checked.
    """
    with claimed(output.path, job, say=say) as partial:
        yield partial
        output.publish(partial)
        with writing(output.path):
            for pattern in (*scratch, JOB_FILE):
                for file in output.path.glob(pattern):
                    file.unlink()


@contextmanager
def claimed(
    out: Path, job: Mapping[str, Any] | None = None, *, say: Callable[[str], None] | None = None
) -> Iterator[Path]:
    """The partial folder of an output, made if need be, and other runs kept out of it.

    After an error it stays if a run of the same job can use what is finished, and goes if not.

    Args:
        job: what is done, of `mla_deploy.job`. A partial folder of the same job is resumed. None:
            nothing of the work is of use to another run.
        say: told that finished work is kept.

    Raises:
        OutputError: the folder belongs to another job or is being written by another run, or
            nothing can be written.
    """
    partial = out.with_name(f"{out.name}.partial")
    with writing(partial):
        partial.mkdir(exist_ok=True)
        job_file = (partial / JOB_FILE).open("a+", encoding="utf-8")
    with job_file:
        _claim(partial, job_file, job)
        try:
            yield partial
        except BaseException:
            if job is None or not holds_work(partial):
                shutil.rmtree(partial, ignore_errors=True)
            elif say is not None:
                say(f"what is done so far is kept in {partial}: the same command goes on from it")
            raise


def holds_work(partial: Path) -> bool:
    """Whether something is finished there; names with a dot in front are of notes and halves."""
    return any(name != JOB_FILE and not name.startswith(".") for name in os.listdir(partial))


def _claim(partial: Path, job_file: IO[str], job: Mapping[str, Any] | None) -> None:
    """Lock the folder and check, or record, whose it is."""
    _lock(partial, job_file)
    job_file.seek(0)
    recorded = job_file.read()
    text = json.dumps(job or {}, indent=1, sort_keys=True) + "\n"
    if job and recorded == text:
        return
    before = _read(recorded)
    is_of_no_use = before == {} or (before is not None and not holds_work(partial))
    if set(os.listdir(partial)) - {JOB_FILE} and not is_of_no_use:
        if not recorded:
            (partial / JOB_FILE).unlink()  # made by this run, in somebody else's folder
        raise OutputError(
            f"{partial} holds the unfinished work of another command, source or version",
            found="no readable job.json" if before is None else difference(before, job or {}),
            hint=f"repeat that command to finish it, or remove {partial}",
        )
    with writing(partial):
        _empty(partial)
        job_file.truncate(0)
        job_file.write(text)
        job_file.flush()


def _lock(partial: Path, job_file: IO[str]) -> None:
    try:
        fcntl.flock(job_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that has just ended may have taken the folder away between `open` and `flock`.
        is_locked = os.path.samestat(os.fstat(job_file.fileno()), (partial / JOB_FILE).stat())
    except (BlockingIOError, FileNotFoundError):
        is_locked = False
    if not is_locked:
        raise OutputError(
            f"another run is writing {partial}", hint="wait for it, or choose another output"
        )


def _empty(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != JOB_FILE:
            entry.unlink()


def _read(recorded: str) -> dict[str, Any] | None:
    try:
        found = json.loads(recorded)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
