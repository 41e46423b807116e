#!/usr/bin/env python3
"""Fetch TensorRT's headers to compile the plugin with, without installing anything.

    TENSORRT_ROOT=$(tools/fetch_tensorrt_headers.py [--folder FOLDER])

NVIDIA's packages for pip have no headers. The wheel of kernel-lens carries those of TensorRT 10.14
(Apache-2.0). pip downloads that wheel alone, none of what it depends on, and checks it against the
digest below. Only headers are taken out of it, into FOLDER/include, by default
build/tensorrt-headers/include; what is there is replaced. The line printed is FOLDER.

Exit status 1: they cannot be had here, and standard error says why.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "kernel-lens==2.0.1"
SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
HEADERS = PurePosixPath("kernel_lens/include/tensorrt")
SECONDS = 120
"""For pip: a build must not hang on a network that swallows packets."""


class FetchError(Exception):
    """The headers cannot be had."""


def main() -> int:
    """Fetch them anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "tensorrt-headers")
    folder = parser.parse_args().folder.resolve()
    try:
        fetch(folder)
    except (FetchError, OSError) as error:
        sys.stderr.write(f"cannot fetch TensorRT's headers: {error}\n")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


def fetch(folder: Path) -> None:
    """All of the headers, or nothing.

    Raises:
        FetchError: there is no such wheel, no network, or it is another file than expected.
    """
    with tempfile.TemporaryDirectory() as name:
        wheel = download(Path(name))
        made = Path(name) / "include"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in map(PurePosixPath, archive.namelist()):
                if member.parent == HEADERS and member.suffix == ".h":
                    (made / member.name).write_bytes(archive.read(str(member)))
        shutil.rmtree(folder / "include", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(made, folder / "include")


def download(work: Path) -> Path:
    """The wheel, with the digest that it must have."""
    wanted = work / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", f"--dest={work}", f"--requirement={wanted}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip took more than {SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        raise FetchError(error.stderr.strip()) from None
    return next(work.glob("*.whl"))


if __name__ == "__main__":
    sys.exit(main())
