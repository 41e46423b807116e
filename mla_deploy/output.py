"""Writing a result folder: whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_deploy.errors import OutputError


def check_output(source: Path, out: Path, is_ours: Callable[[Path], bool], *, force: bool) -> None:
    """Refuse an output that exists, that holds the source, or that lies in it.

    Args:
        source: what is read.
        out: the folder to make.
        is_ours: tells an earlier result of the same command. With `force` such a folder may be
            replaced, and an empty one, but no other.

    Raises:
        OutputError
    """
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError("the output must be apart from the source", found=f"{out} and {source}")
    if not os.path.lexists(out):
        if not out.parent.is_dir():
            raise OutputError(f"{out} cannot be made", found=f"{out.parent} is no folder")
        return
    if not force:
        raise OutputError(
            f"{out} exists already", hint="choose another name, or replace it with --force"
        )
    is_folder = out.is_dir() and not out.is_symlink()
    if not is_folder or (any(out.iterdir()) and not is_ours(out)):
        raise OutputError(
            f"{out} is not replaced, because mla-deploy did not write it",
            allowed="an earlier result of the same command, or an empty folder",
            hint="choose another name, or remove it yourself",
        )


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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's errors of writing into `folder` into an OutputError."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{folder} cannot be written",
            found=error.strerror or error,
            hint="free some space or choose another disk" if is_full else None,
        ) from None


def publish(finished: Path, out: Path) -> None:
    """Give a finished folder its name; an old result goes only when the new one is in place."""
    replaced = out.with_name(f".{out.name}.replaced")
    with writing(out):
        if os.path.lexists(out):
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        finished.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` on success, and disappears on failure.

    Raises:
        OutputError: it cannot be made or renamed.
    """
    partial = out.with_name(f".{out.name}.partial")
    with writing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        yield partial
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
