"""Where a result goes; `mla_deploy.workspace` is where it grows."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mla_deploy.errors import OutputError


@dataclass(frozen=True)
class Output:
    """The folder that a command makes.

    Attributes:
        is_ours: tells an earlier result of the same command. With `force` such a folder may be
            replaced, and an empty one, but no other.
    """

    path: Path
    is_ours: Callable[[Path], bool]
    force: bool

    def check(self) -> None:
        """Raise an OutputError where something is in the way that may not be replaced."""
        out = self.path
        if not os.path.lexists(out):
            return
        if not self.force:
            raise OutputError(
                f"{out} exists already", hint="choose another name, or replace it with --force"
            )
        is_folder = out.is_dir() and not out.is_symlink()
        if not is_folder or (any(out.iterdir()) and not self.is_ours(out)):
            raise OutputError(
                f"{out} is not replaced, because mla-deploy did not write it",
                allowed="an earlier result of the same command, or an empty folder",
                hint="choose another name, or remove it yourself",
            )

    def publish(self, finished: Path) -> None:
        """Give a finished folder its name; an old result goes only when the new one is in place.

        Raises:
            OutputError: what came there since the first check may not be replaced, or the folder
                cannot be renamed. Then all is as it was.
        """
        self.check()
        out = self.path
        with writing(out):
            if not os.path.lexists(out):
                finished.rename(out)
                return
            replaced = out.with_name(f".{out.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
            try:
                finished.rename(out)
            except BaseException:
                replaced.rename(out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)


def check_output(
    source: Path, out: Path, is_ours: Callable[[Path], bool], *, force: bool
) -> Output:
    """Refuse an output that exists, that holds the source, or that lies in it.

    Args:
        source: what is read.
        out: the folder to make.
        is_ours, force: as of `Output`.

    Raises:
        OutputError
    """
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(
            "the output must be apart from the source",
            found=f"{out} and {source}",
            hint="name another folder",
        )
    if not out.parent.is_dir():
        raise OutputError(
            f"{out} cannot be made", found=f"{out.parent} is no folder", hint="make it first"
        )
    output = Output(out, is_ours, force)
    output.check()
    return output


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
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. The file takes its own when the block ends well, or none.

    Raises:
        OutputError: as `writing`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


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
