"""Where an output grows: a folder `OUT.partial` beside it, which takes its name when it is whole.

A killed run leaves the partial folder and nothing else; the same command goes on from there. A run
that fails removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mla_deploy.errors import OutputError
from mla_deploy.output import publish, writing

JOB_FILE = "job.json"


@contextmanager
def workspace(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The partial folder, renamed to `out` at the end of the block, or removed if that fails.

    Args:
        out: may exist: it is replaced at the very end.
        job: what is done, as JSON. A partial folder of the same job is resumed.

    Raises:
        OutputError: the partial folder belongs to another job or is being written by another run,
            or nothing can be written.
    """
    partial = out.with_name(f"{out.name}.partial")
    with claimed(partial, job):
        try:
            yield partial
            publish(partial, out)
            with writing(out):  # only now: a kill before it must not orphan the partial folder
                (out / JOB_FILE).unlink()
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def claimed(folder: Path, job: dict[str, Any]) -> Iterator[None]:
    """Keep a folder of unfinished work for this job, and other runs out of it; made if need be.

    Args:
        job: what is done, as JSON.

    Raises:
        OutputError: the folder belongs to another job or is being written by another run, or
            nothing can be written.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
        job_file = (folder / JOB_FILE).open("a+", encoding="utf-8")
    with job_file:
        _claim(folder, job_file, job)
        yield


def _claim(partial: Path, job_file: IO[str], job: dict[str, Any]) -> None:
    """Lock the folder and check, or record, whose it is."""
    try:
        fcntl.flock(job_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another run is writing {partial}", hint="wait for it, or choose another output"
        ) from None
    job_file.seek(0)
    recorded = job_file.read()
    text = json.dumps(job, indent=1, sort_keys=True) + "\n"
    # A run killed before it could record its job has done no work either.
    if not recorded and set(os.listdir(partial)) <= {JOB_FILE}:
        with writing(partial):
            job_file.write(text)
            job_file.flush()
    elif recorded != text:
        raise OutputError(
            f"{partial} holds the unfinished work of another command, source or version",
            found=_difference(recorded, job),
            hint=f"repeat that command to finish it, or remove {partial}",
        )


def _difference(recorded: str, job: dict[str, Any]) -> str:
    try:
        other = json.loads(recorded)
        changed = [key for key in job if other.get(key) != job[key]]
        return ", ".join(f"{key} {other.get(key)} instead of {job[key]}" for key in changed)
    except (ValueError, AttributeError):
        return "no readable job.json"
