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

from mla_deploy.checkpoint import writing
from mla_deploy.config import read_json_object
from mla_deploy.errors import MlaError, OutputError
from mla_deploy.recipe import RECIPE_KEY

JOB_FILE = "job.json"


def check_output(source: Path, out: Path, *, force: bool) -> None:
    """Refuse an output that exists, that holds the source, or that lies in it.

    With `force` an earlier result of ours may be replaced, but no other folder.

    Raises:
        OutputError
    """
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(
            "the output must be apart from the source", found=f"{out} and {source}"
        )
    if not os.path.lexists(out):
        if not out.parent.is_dir():
            raise OutputError(f"{out} cannot be made", found=f"{out.parent} is no folder")
        return
    if not force:
        raise OutputError(
            f"{out} exists already", hint="choose another name, or replace it with --force"
        )
    if not _is_ours(out):
        raise OutputError(
            f"{out} is not replaced, because mla-deploy did not write it",
            allowed="a checkpoint that quantize wrote, or an empty folder",
            hint="choose another name, or remove it yourself",
        )


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
    with writing(partial):
        partial.mkdir(exist_ok=True)
        job_file = (partial / JOB_FILE).open("a+", encoding="utf-8")
    with job_file:
        _claim(partial, job_file, job)
        try:
            yield partial
            with writing(partial):
                (partial / JOB_FILE).unlink()
            _rename(partial, out)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def check_space(folder: Path, needed: int) -> None:
    """Raise an OutputError where the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the disk of {folder} is too full",
            found=f"{free / 1e6:,.1f} MB free",
            allowed=f"{needed / 1e6:,.1f} MB needed",
            hint="free some space or choose another disk",
        )


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


def _rename(partial: Path, out: Path) -> None:
    """Give the finished folder its name; an old result goes only when the new one is in place."""
    replaced = out.with_name(f"{out.name}.replaced")
    with writing(out):
        if os.path.lexists(out):
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)


def _is_ours(out: Path) -> bool:
    if out.is_symlink() or not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    try:
        return RECIPE_KEY in read_json_object(out / "config.json")
    except MlaError:
        return False
