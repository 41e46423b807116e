"""Writing a result folder: whole, or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_deploy.errors import OutputError


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise unless `out` may be written.

    Raises:
        OutputError: it exists and `force` is not set, or its parent does not exist.
    """
    if out.exists() and not force:
        raise OutputError(
            f"{out} exists already", hint="choose another name, or replace it with --force"
        )
    if not out.parent.is_dir():
        raise OutputError(f"the folder {out.parent} does not exist", hint="make it first")


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        free = shutil.disk_usage(out.parent).free
        raise OutputError(
            f"{out} cannot be written",
            found=f"{error.strerror}; {free / 1e9:.2f} GB free",
            hint="free some space, or write to another disk",
        ) from None


def publish(folder: Path, out: Path) -> None:
    """Give a finished folder its name; what had that name before goes only then."""
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        out.rename(old)
    folder.rename(out)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `out` on success, and disappears on failure.

    Raises:
        OutputError: see `refuse_existing` and `disk_errors`.
    """
    refuse_existing(out, force=force)
    temporary = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            publish(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
