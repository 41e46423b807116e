#!/usr/bin/env python3
"""Fetch ONNX Runtime's C headers, which no wheel holds, without installing anything.

    tools/fetch_onnxruntime_headers.py [FOLDER]     (default: build/onnxruntime-headers)

apt downloads Debian's package libonnxruntime-dev and checks it against the signed index; dpkg-deb
unpacks it. apt works on lists and caches of its own inside FOLDER: the system's stay untouched,
nothing is installed, and no root is needed. The mirror is the one the system uses already.

The last line printed is the folder to give to CMake as ONNXRUNTIME_ROOT. CMake runs this by itself
where it finds no headers (option MLA_FETCH_ONNXRUNTIME_HEADERS). Exit status 1: they cannot be had
here, and standard error says why.
"""

from __future__ import annotations

import argparse
import os
import platform
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "libonnxruntime-dev"
HEADER = "onnxruntime_c_api.h"
DEBIAN_SUITE = "trixie"
"""The first Debian release with the package. Its headers serve every later onnxruntime."""
SECONDS = 120
"""For one command of apt: a build must not hang on a network that swallows packets."""


class FetchError(Exception):
    """The headers cannot be had."""


def main() -> int:
    """Fetch, unless an earlier call did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=ROOT / "build" / "onnxruntime-headers"
    )
    folder = parser.parse_args().folder.resolve()
    try:
        if not _holds_headers(folder):
            fetch(folder)
    except (FetchError, OSError) as error:
        sys.stderr.write(f"cannot fetch {PACKAGE}: {error}\n")
        return 1
    sys.stdout.write(f"{folder / 'usr'}\n")
    return 0


def fetch(folder: Path) -> None:
    """Download and unpack the package into `folder`, all of it or nothing.

    Raises:
        FetchError: a tool is missing, the network is, or this system's mirror lacks the package.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"there is no {tool} here, so this is no Debian or Ubuntu")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as name:
        work = Path(name)
        apt = ["apt-get", "--quiet=2", f"--config-file={_private_apt(work)}"]
        _run([*apt, "update"], work)
        _run([*apt, "download", PACKAGE], work)
        packages = list(work.glob("*.deb"))
        if len(packages) != 1:
            raise FetchError(f"apt downloaded {len(packages)} packages, not one")
        unpacked = work / "unpacked"
        _run(["dpkg-deb", "--extract", str(packages[0]), str(unpacked)], work)
        if not _holds_headers(unpacked):
            raise FetchError(f"{packages[0].name} has no {HEADER}")
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)


def _holds_headers(folder: Path) -> bool:
    return any((folder / "usr" / "include").glob(f"**/{HEADER}"))


def _private_apt(work: Path) -> Path:
    """A configuration that keeps apt inside `work`: one source, none of the system's hooks."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(_source())
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferencesparts": "-",
        "APT::Update::Error-Mode": "any",
        "APT::Sandbox::User": pwd.getpwuid(os.getuid()).pw_name,  # apt's own cannot enter `work`
        "Acquire::Languages": "none",
        "Acquire::Retries": "0",
        "Acquire::http::Timeout": "15",
        "Acquire::https::Timeout": "15",
    }
    hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    configuration = work / "apt.conf"
    configuration.write_text(
        "".join(f"#clear APT::Update::{hook};\n" for hook in hooks)
        + "".join(f'{key} "{value}";\n' for key, value in settings.items())
    )
    return configuration


def _source() -> str:
    """The line of sources.list that names this system's mirror and a release with the package."""
    system = platform.freedesktop_os_release()
    release = system.get("VERSION_CODENAME", "")
    suite, component = (DEBIAN_SUITE, "main") if system["ID"] == "debian" else (release, "universe")
    command = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)"]
    output = _run([*command, "Created-By: Packages"], ROOT)
    for line in output.splitlines():
        found, _, mirror = line.partition(" ")
        if found == release and mirror:
            keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
            signed = f"[signed-by={keys}] " if system["ID"] == "debian" and keys.exists() else ""
            return f"deb {signed}{mirror} {suite} {component}\n"
    raise FetchError(f"apt's sources name no mirror of this system's release ({release or '?'})")


def _run(command: list[str], work: Path) -> str:
    try:
        result = subprocess.run(
            command, cwd=work, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise FetchError(f"{command[0]} took more than {SECONDS} s") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise FetchError(f"{command[0]}: {lines[-1]}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
