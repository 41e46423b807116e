#!/usr/bin/env python3
"""Fetch Debian packages to compile with, without installing anything.

    tools/fetch_debian.py [--arch ARCH] [--folder FOLDER] PACKAGE...

For headers and static libraries that no Python package holds: libonnxruntime-dev, libpcre2-dev,
libutf8proc-dev. CMake runs this by itself for what it does not find (option
MLA_FETCH_DEPENDENCIES). Each package is unpacked into FOLDER/PACKAGE, by default
build/debian/PACKAGE, or build/debian-ARCH/PACKAGE for another architecture than this machine's; one
that is there already is left alone. The lines printed are the folders `usr`, one a package.

apt downloads the packages and checks them against the signed index; dpkg-deb unpacks them. apt
works on lists and caches of its own inside FOLDER: the system's stay untouched, nothing is
installed, and no root is needed. The mirror and the release are the system's own; a package that an
older Debian does not have yet comes from the first release with all of them. Exit status 1: they
cannot be had here, and standard error says why.
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
LATER_SUITE = "trixie"
"""The first Debian release with libonnxruntime-dev, whose headers serve every later onnxruntime."""
SECONDS = 120
"""For one command of apt: a build must not hang on a network that swallows packets."""


class FetchError(Exception):
    """The packages cannot be had."""


def main() -> int:
    """Fetch what earlier calls did not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", metavar="PACKAGE")
    parser.add_argument("--arch", help="such as arm64; this machine's if not given")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    default = "debian" if args.arch is None else f"debian-{args.arch}"
    folder = (args.folder or ROOT / "build" / default).resolve()
    try:
        missing = [package for package in args.packages if not (folder / package).is_dir()]
        if missing:
            fetch(missing, folder, args.arch)
    except (FetchError, OSError) as error:
        sys.stderr.write(f"cannot fetch {' '.join(args.packages)}: {error}\n")
        return 1
    sys.stdout.write("".join(f"{folder / package / 'usr'}\n" for package in args.packages))
    return 0


def fetch(packages: list[str], folder: Path, arch: str | None) -> None:
    """Download and unpack each package into a folder of its name, all of it or nothing.

    Raises:
        FetchError: a tool is missing, the network is, or this system's mirror lacks a package.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"there is no {tool} here, so this is no Debian or Ubuntu")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as name:
        work = Path(name)
        apt = ["apt-get", "--quiet=2", f"--config-file={_private_apt(work, arch)}"]
        _run([*apt, "update"], work)
        for package in packages:
            _run([*apt, "download", package], work)
            found = list(work.glob(f"{package}_*.deb"))
            if len(found) != 1:
                raise FetchError(f"apt downloaded {len(found)} files of {package}, not one")
            unpacked = work / "unpacked"
            _run(["dpkg-deb", "--extract", str(found[0]), str(unpacked)], work)
            unpacked.rename(folder / package)


def _private_apt(work: Path, arch: str | None) -> Path:
    """A configuration that keeps apt inside `work`: its own sources, none of the system's hooks."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (work / part).mkdir(parents=True)
    (work / "status").touch()
    release, sources = _sources()
    (work / "sources.list").write_text(sources)
    settings = {
        "APT::Default-Release": release,
        "APT::Update::Error-Mode": "any",
        "APT::Sandbox::User": pwd.getpwuid(os.getuid()).pw_name,  # apt's own cannot enter `work`
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferencesparts": "-",
        "Acquire::Languages": "none",
        "Acquire::Retries": "0",
        "Acquire::http::Timeout": "15",
        "Acquire::https::Timeout": "15",
    }
    if arch is not None:
        settings |= {"APT::Architecture": arch, "APT::Architectures": arch}
    hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    configuration = work / "apt.conf"
    configuration.write_text(
        "".join(f"#clear APT::Update::{hook};\n" for hook in hooks)
        + "".join(f'{key} "{value}";\n' for key, value in settings.items())
    )
    return configuration


def _sources() -> tuple[str, str]:
    """The release to prefer, and the lines of sources.list that name this system's mirror."""
    system = platform.freedesktop_os_release()
    release = system.get("VERSION_CODENAME", "")
    debian = system["ID"] == "debian"
    suites = dict.fromkeys([release, LATER_SUITE] if debian else [release])
    components = "main" if debian else "main universe"
    command = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)"]
    for line in _run([*command, "Created-By: Packages"], ROOT).splitlines():
        found, _, mirror = line.partition(" ")
        if found == release and mirror:
            keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
            signed = f"[signed-by={keys}] " if debian and keys.exists() else ""
            lines = [f"deb {signed}{mirror} {suite} {components}\n" for suite in suites]
            return release, "".join(lines)
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
