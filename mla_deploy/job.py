"""What a command does, noted beside its unfinished work: only the same command goes on with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mla_deploy import __version__
from mla_deploy.bundle import LARGE_FILE_BYTES, MANIFEST, sha256_of

_MODEL_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja"}
"""What is read of a checkpoint, tokenizer included, by the ends of names."""


def job_of(
    command: str,
    sources: Sequence[Path],
    options: Mapping[str, Any],
    inputs: Iterable[Path] = (),
) -> dict[str, Any]:
    """What must be equal for a repeated run to go on with the work of another, as JSON.

    Args:
        sources: folders of the models that are read.
        options: what was chosen. A path among them counts however it is spelled.
        inputs: other files that are read, such as texts.
    """
    files = [file for source in sources for file in _model_files(source)]
    return {
        "version": __version__,
        "command": command,
        "sources": [str(source.resolve()) for source in sources],
        "files": stamp([*files, *inputs]),
        "options": {name: _plain(value) for name, value in options.items()},
    }


def stamp(files: Iterable[Path]) -> dict[str, str]:
    """What tells a file from a changed one: its sha256, or size and time if it is large.

    The digests in a bundle's manifest stand for its files.
    """
    stamps = {}
    for file in files:
        if not file.is_file():
            continue
        found = file.stat()
        is_large = found.st_size > LARGE_FILE_BYTES
        # Not the target of a link to the file, whose name may say nothing.
        stamps[str(file.parent.resolve() / file.name)] = (
            f"{found.st_size} bytes of {found.st_mtime_ns}" if is_large else sha256_of(file)
        )
    return stamps


def difference(before: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """In what an earlier job is not this one: `--window 512, not 256`, `config.json changed`."""
    was, now = before.get("command"), job.get("command")
    if was is None or was != now:
        return f"the work of `{was}`" if was else "the work of another command"
    if before.get("version") != job["version"]:
        return f"mla-deploy {before.get('version')}, not {job['version']}"
    return ", ".join(_differences(before, job))


def _differences(before: Mapping[str, Any], job: Mapping[str, Any]) -> Iterator[str]:
    if before["sources"] != job["sources"]:
        yield f"the model {' and '.join(before['sources'])}, not {' and '.join(job['sources'])}"
    for name in sorted({*before["options"], *job["options"]}):
        was, now = before["options"].get(name), job["options"].get(name)
        if was != now:
            yield f"--{name.replace('_', '-')} {_shown(was)}, not {_shown(now)}"
    for file in sorted({*before["files"], *job["files"]}):
        was, now = before["files"].get(file), job["files"].get(file)
        if was and now and was != now:
            yield f"{Path(file).name} changed"
        elif was != now and before["sources"] == job["sources"]:
            yield f"{Path(file).name}, which is {'gone' if was else 'new'}"


def _model_files(source: Path) -> list[Path]:
    if (source / MANIFEST).is_file():
        return [source / MANIFEST]
    return sorted(file for file in source.glob("*") if file.suffix in _MODEL_FILES)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " and ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)
