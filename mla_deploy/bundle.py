"""Bundles: a folder with everything a program needs to run a model, and nothing else.

    bundle/
        manifest.json      this file's `Manifest`, with the size and sha256 of every other file
        model.onnx, model.onnx.data
        tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json

A bundle for the CPU computes in float32; `CudaInfo` is in the manifest of one for a GPU.

A bundle for TensorRT has, in place of the graph, an engine a GPU and an ONNX model that names it;
`TensorRtInfo` describes them, and `mla_deploy.exporters.tensorrt.target` their inputs and outputs.

A bundle is data, never code, but for TensorRT's engines, which hold code for the GPU: load those
only from somebody you trust. Everything else is read as untrusted input: paths stay inside the
folder, sizes are checked before anything is loaded.

Graph inputs (B sequences, S new tokens padded on the right, M pages, L logits wanted a sequence):

| name | type | shape |
|---|---|---|
| `input_ids` | int64 | [B, S] |
| `past_lengths`, `new_lengths` | int64 | [B] |
| `block_table` | int64 | [B, M], page 0 is the scratch page |
| `logit_index` | int64 | [B, L], positions in S |
| `cache.{layer}.{part}` | the part's | [pages, *page_shape] |

and outputs: `logits` float32 [B, L, vocab_size], `present.{layer}.{part}` as the inputs, meant to
be bound to the same memory.

May be imported by the runtime: needs neither torch nor onnx.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mla_deploy.errors import BundleError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
LARGE_FILE_BYTES = 64 << 20
"""Files above it are hashed only when a full check is asked for."""
MAX_MANIFEST_BYTES = 16 << 20
MAX_PAGE_BYTES = 64 << 20
"""Of one part: 1 MiB a token, where a real one takes less than 4 KiB."""
PORTABLE_TARGET = "sm80+"
"""An engine for every GPU of compute capability 8.0 and above."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """A file of the bundle, relative to its folder."""

    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.name:
            raise ValueError(f"the path {path!r} leaves the bundle")
        if not path.isprintable():
            raise ValueError(f"the path {path!r} holds characters that no file name needs")
        return path


class CachePartInfo(_Strict):
    """One typed array of a layer's cache: [pages, *page_shape]."""

    name: str = Field(pattern="^[a-z0-9_]+$")
    dtype: Literal["uint8", "int8", "float16", "float32"]
    page_shape: list[int] = Field(min_length=1, max_length=4)

    @field_validator("page_shape")
    @classmethod
    def _positive(cls, shape: list[int]) -> list[int]:
        if any(not 0 < extent <= 1 << 20 for extent in shape):
            raise ValueError(f"page shape {shape} is out of range")
        return shape

    @model_validator(mode="after")
    def _whole_tokens(self) -> CachePartInfo:
        size = _page_bytes(self)
        if size % 64 or size > MAX_PAGE_BYTES:
            raise ValueError(
                f"a page of {size} bytes is not 64 tokens of at most {MAX_PAGE_BYTES // 64} bytes"
            )
        return self


class LayerCache(_Strict):
    """The cache of one layer."""

    format: str
    parts: list[CachePartInfo] = Field(min_length=1)

    @field_validator("parts")
    @classmethod
    def _distinct(cls, parts: list[CachePartInfo]) -> list[CachePartInfo]:
        if len({part.name for part in parts}) != len(parts):
            raise ValueError("two parts have the same name")
        return parts


class CacheInfo(_Strict):
    """The cache of the model."""

    page_tokens: Literal[64]
    layers: list[LayerCache] = Field(min_length=1)


class ModelInfo(_Strict):
    """What a program may want to know about the model."""

    model_type: str
    parameters: int
    vocab_size: int = Field(gt=0, le=1 << 24)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    q_lora_rank: int | None
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    bos_token_id: int | None
    eos_token_ids: list[int]


class GraphInfo(_Strict):
    """The decoder graph."""

    path: str
    backend: Literal["onnx", "tensorrt"]
    lowering: str
    opset: int


class CudaInfo(_Strict):
    """The graph is spelled for ONNX Runtime's CUDA provider."""

    dtype: Literal["float16"]
    """Of activations."""


class EngineInfo(_Strict):
    """A TensorRT engine."""

    target: str = Field(pattern=r"^sm([0-9]{2,3}|80\+)$")
    """The GPU it was built for, as `sm89`, or `PORTABLE_TARGET`."""
    path: str
    context: str
    """An ONNX model of one EPContext node that names the engine, for ONNX Runtime's providers."""


class ProfileInfo(_Strict):
    """What an engine was optimised for: least, usual and most."""

    tokens: tuple[int, int, int]
    rows: tuple[int, int, int]
    """Tokens of the cache that are read; whole pages."""
    logits: tuple[int, int, int]

    def extent(self, axis: str) -> tuple[int, int, int]:
        """Least, usual and most of an axis that a `TensorInfo` names.

        With pages, there is one more than a sequence needs: the scratch page.
        """
        if axis in ("pages", "pages_per_sequence"):
            least, usual, most = (rows // 64 + (axis == "pages") for rows in self.rows)
            return least, usual, most
        extents = {"tokens": self.tokens, "rows": self.rows, "logits": self.logits}
        return extents[axis]


class TensorInfo(_Strict):
    """An input or output; extents that vary are named."""

    name: str
    dtype: Literal["int64", "uint8", "int8", "float16", "float32"]
    shape: list[int | str]


class TensorRtInfo(_Strict):
    """Engines and what they need."""

    module: Literal["tensorrt", "tensorrt_rtx"]
    version: str | None
    """Of the TensorRT that built the engines; None: there are none, only the graph."""
    dtype: Literal["float16", "bfloat16", "float32"]
    """Of activations."""
    profiles: list[ProfileInfo] = Field(min_length=2, max_length=2)
    """For up to a chunk of tokens, and for exactly one. In this order, as ONNX Runtime's providers
    stay with the first."""
    plugin: bool = False
    """Whether the graph has `LatentAttention` as a node, for the plugin, and a cache of pages."""
    engines: list[EngineInfo]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    @field_validator("profiles")
    @classmethod
    def _order(cls, profiles: list[ProfileInfo]) -> list[ProfileInfo]:
        if profiles[1].tokens != (1, 1, 1):
            raise ValueError("the second profile is not for one token: export the model again")
        return profiles


class Manifest(_Strict):
    """`manifest.json`."""

    format: Literal["mla-deploy-bundle"] = "mla-deploy-bundle"
    version: int
    producer: str
    model: ModelInfo
    graph: GraphInfo
    cache: CacheInfo
    recipe: dict[str, Any]
    files: list[FileEntry]
    tensorrt: TensorRtInfo | None = None
    """Present with the backend `tensorrt`."""
    cuda: CudaInfo | None = None
    """Present where the graph is for a GPU; the backend is `onnx` then."""

    @model_validator(mode="after")
    def _one_cache_per_layer(self) -> Manifest:
        if len(self.cache.layers) != self.model.num_hidden_layers:
            raise ValueError(
                f"{len(self.cache.layers)} layers of cache for a model of "
                f"{self.model.num_hidden_layers} layers"
            )
        if (self.graph.backend == "tensorrt") != (self.tensorrt is not None):
            raise ValueError("the backend and the description of engines do not fit")
        if self.cuda is not None and self.graph.backend != "onnx":
            raise ValueError("a graph for ONNX Runtime's CUDA provider is of the backend onnx")
        return self

    @property
    def target(self) -> Literal["cpu", "cuda", "tensorrt"]:
        """What the bundle was exported for."""
        if self.tensorrt is not None:
            return "tensorrt"
        return "cpu" if self.cuda is None else "cuda"


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


def part_bytes_per_token(part: CachePartInfo) -> int:
    """Bytes of one token in one part."""
    return _page_bytes(part) // 64


def _page_bytes(part: CachePartInfo) -> int:
    width = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4}[part.dtype]
    return math.prod(part.page_shape) * width


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
        raise BundleError(
            f"{folder} is not a bundle",
            found=f"no {MANIFEST}",
            hint="make one with `mla-deploy export MODEL -o BUNDLE`",
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
