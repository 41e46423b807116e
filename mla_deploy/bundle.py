"""Bundles: a folder with everything a program needs to run a model, and nothing else.

    bundle/
        manifest.json      `mla_deploy.manifest`, with the size and sha256 of every other file
        model.onnx, model.onnx.data
        tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json

A bundle for the CPU computes in float32; `CudaInfo` is in the manifest of one for a GPU.

A bundle for TensorRT has, in place of the graph, an engine a GPU and an ONNX model that names it;
`TensorRtInfo` describes them, and `mla_deploy.exporters.tensorrt.target` their inputs and outputs.

A bundle is data, never code, but for TensorRT's engines, which hold code for the GPU: load those
only from somebody you trust. Everything else is read as untrusted input: paths stay inside the
folder, sizes are checked before anything is loaded.

May be imported by the runtime: needs neither torch nor onnx.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mla_deploy.errors import BundleError
from mla_deploy.manifest import FORMAT_VERSION, FileEntry, Manifest, part_bytes_per_token

MANIFEST = "manifest.json"
LARGE_FILE_BYTES = 64 << 20
"""Files above it are hashed only when a full check is asked for."""
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened and checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = False) -> Bundle:
        """Read and check a bundle.

        Args:
            path: the folder.
            verify: hash large files too; otherwise only their sizes are compared.

        Raises:
            BundleError: no bundle, a manifest of another version, or a file that is missing or is
                not what the manifest says.
        """
        bundle = cls.of_manifest(path)
        for entry in bundle.manifest.files:
            _check_file(bundle.path, entry, verify)
        return bundle

    @classmethod
    def of_manifest(cls, path: Path | str) -> Bundle:
        """Read the manifest alone, for a caller that has the files checked by the engine.

        Raises:
            BundleError: no bundle, or a manifest of another version or with mistakes.
        """
        folder = Path(path)
        bundle = cls(folder, _read_manifest(folder))
        bundle.file(bundle.manifest.graph.path)
        for engine in bundle.manifest.tensorrt.engines if bundle.manifest.tensorrt else ():
            bundle.file(engine.path)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if not self.has(name):
            raise BundleError(
                f"{self.path / MANIFEST} does not list {name}",
                found=", ".join(entry.path for entry in self.manifest.files),
                hint="export the model again",
            )
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the manifest lists the file."""
        return any(entry.path == name for entry in self.manifest.files)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache for one token in all layers, scales and zeros included."""
        return sum(
            part_bytes_per_token(part)
            for layer in self.manifest.cache.layers
            for part in layer.parts
        )


def describe_file(folder: Path, name: str) -> FileEntry:
    """The manifest entry of a file that was just written."""
    path = folder / name
    return FileEntry(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into the folder."""
    fields = manifest.model_dump(mode="json")
    for optional in ("tensorrt", "cuda"):
        if fields[optional] is None:
            del fields[optional]
    text = json.dumps(fields, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        found = f"no {MANIFEST}" if folder.is_dir() else "no such folder"
        if (folder / "config.json").is_file():
            found = "a checkpoint"
        raise BundleError(
            f"{folder} is not a bundle",
            found=found,
            hint="make one of a checkpoint with `mla-deploy build MODEL -o BUNDLE`",
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {MAX_MANIFEST_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8, long integers
        raise BundleError(f"{path} cannot be read", found=error, hint="export again") from None
    if not isinstance(raw, dict) or raw.get("format") != "mla-deploy-bundle":
        raise BundleError(f"{path} is not the manifest of a bundle", hint="export again")
    if raw.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} is of another version of the bundle format",
            found=raw.get("version"),
            allowed=FORMAT_VERSION,
            hint="export again with this mla-deploy, or use the one that wrote it: "
            f"{raw.get('producer')}",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path} is not valid at {where}", found=first["msg"], hint="export again"
        ) from None


def _check_file(folder: Path, entry: FileEntry, verify: bool) -> None:
    path = folder / entry.path
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        is_inside = False
    if not is_inside:
        raise BundleError(
            f"{path} leaves the bundle through a symbolic link", hint="copy the file instead"
        )
    if not path.is_file():
        raise BundleError(f"{path} is missing", hint="copy the bundle whole, or export again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(
            f"{path} is not of the size in the manifest",
            found=f"{size} bytes",
            allowed=f"{entry.bytes} bytes",
            hint="copy the bundle again, or export again",
        )
    if (verify or size <= LARGE_FILE_BYTES) and sha256_of(path) != entry.sha256:
        raise BundleError(
            f"{path} is damaged: its sha256 is not the manifest's",
            hint="copy the bundle again, or export again",
        )
