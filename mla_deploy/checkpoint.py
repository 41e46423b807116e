"""Reading and writing checkpoints: safetensors, one file or many, tensor by tensor.

Nothing here ever holds more than a few tensors: reading opens a file anew after every
`_REOPEN_BYTES`, because pages of a mapped file count as the process's memory until it is unmapped.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from mla_deploy.config import MlaConfig
from mla_deploy.config_reader import read_json_object
from mla_deploy.errors import CheckpointError
from mla_deploy.families import load_config
from mla_deploy.output import writing

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_REOPEN_BYTES = 64 << 20
_SHARD_BYTES = 128 << 20
_MAX_HEADER_BYTES = 100 << 20
_CHECK_VALUES = 1 << 20
_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
_BYTE_TYPES = {"U8"}
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, known without reading it."""

    file: Path
    dtype: str
    """As safetensors spells it: F32, BF16, U8, ..."""
    shape: tuple[int, ...]
    bytes: int


class TensorFolder:
    """A folder with safetensors.

    Raises (on opening):
        CheckpointError: no weights, a missing shard, or a file that is no safetensors.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(self.path):
            self.tensors.update(_read_header(file))
        self._open_file: Any = None
        self._open_path: Path | None = None
        self._bytes_since_open = 0

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor, in the type it is stored in.

        Args:
            name: as in the file.
            shape: what it must be.

        Raises:
            CheckpointError: missing, of another shape, of a type that is not supported, or with
                values that are not finite.
        """
        info = self.info(name, shape)
        tensor: torch.Tensor = self._file_of(info).get_tensor(name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(
                f"{info.file}: the tensor {name} holds values that are not finite",
                found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()}",
                hint="get the file again, or train without overflow",
            )
        return tensor

    def info(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        """What the header says of a tensor; raises as `read` does."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path} lacks the tensor {name}",
                found=f"{len(self.tensors)} other tensors",
                hint="check that the checkpoint is complete and that config.json belongs to it",
            )
        if shape is not None and info.shape != shape:
            raise CheckpointError(
                f"{info.file}: the tensor {name} has the wrong shape",
                found=list(info.shape),
                allowed=list(shape),
                hint="check that config.json belongs to these weights",
            )
        if info.dtype not in _FLOAT_TYPES | _BYTE_TYPES:
            raise CheckpointError(
                f"{info.file}: the tensor {name} has a type that is not supported",
                found=info.dtype,
                allowed=", ".join(sorted(_FLOAT_TYPES | _BYTE_TYPES)),
            )
        return info

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare the headers with what a model needs; raises as `read` does."""
        for name, shape in shapes.items():
            self.info(name, shape)

    def _file_of(self, info: TensorInfo) -> Any:
        if self._open_path != info.file or self._bytes_since_open > _REOPEN_BYTES:
            self._open_file = None
            self._open_file = safe_open(info.file, framework="pt")
            self._open_path = info.file
            self._bytes_since_open = 0
        self._bytes_since_open += info.bytes
        return self._open_file


class Checkpoint(TensorFolder):
    """A folder with config.json and safetensors.

    Raises (on opening):
        ConfigError: config.json is missing, broken, or asks for something not supported.
        CheckpointError: no weights, a missing shard, or a file that is no safetensors.
    """

    readable_quantization: ClassVar[frozenset[str | None]] = frozenset({None})
    """Whose quantised weights this class can read: `quant_method` in config.json."""

    def __init__(self, path: Path | str) -> None:
        self.config: MlaConfig = load_config(path)
        if self.config.source_quantization not in self.readable_quantization:
            refuse_quantized(self.config.source_quantization, path)
        super().__init__(path)


def refuse_quantized(method: str | None, path: Path | str) -> None:
    """Raise CheckpointError if config.json names a method by which the weights were quantised."""
    if method is not None:
        raise CheckpointError(
            f"{path} holds weights that another tool quantised",
            found=method,
            allowed="float16, bfloat16 or float32 weights",
            hint="take the unquantised checkpoint",
        )


class ShardWriter:
    """Writes tensors into numbered safetensors files of about `_SHARD_BYTES`, and their index.

    A shard appears under its name only when it is whole. Shards that an earlier, interrupted run
    left behind are kept: `is_done` says which tensors need no work. The same tensors in the same
    order give the same files, however often the work was interrupted.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        for leftover in folder.glob(".model-*.tmp"):
            leftover.unlink()
        for file in sorted(folder.glob("model-*.safetensors")):
            for name, info in _read_header(file).items():
                self._weight_map[name] = file.name
                self._total_bytes += info.bytes
        self._shards = len(set(self._weight_map.values()))

    @property
    def done_bytes(self) -> int:
        """Bytes of the tensors in finished shards."""
        return self._total_bytes

    def is_done(self, name: str) -> bool:
        """Whether the tensor is in a finished shard."""
        return name in self._weight_map

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; writes a shard when enough have come together."""
        self.add_all({name: tensor})

    def add_all(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors that belong together: they land in the same shard, so either all are done
        or none is."""
        for name, tensor in tensors.items():
            self._pending[name] = tensor.contiguous()
            self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= _SHARD_BYTES:
            self.flush()

    def finish(self) -> None:
        """Write what is left, and the index."""
        self.flush()
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        with writing(self._folder):
            text = json.dumps(index, indent=1) + "\n"
            (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def flush(self) -> None:
        """Write the tensors taken so far into a shard, however small."""
        if not self._pending:
            return
        self._shards += 1
        name = f"model-{self._shards:05d}.safetensors"
        temporary = self._folder / f".{name}.tmp"
        with writing(self._folder):
            _save(self._pending, temporary)
            temporary.rename(self._folder / name)
        self._weight_map.update(dict.fromkeys(self._pending, name))
        self._total_bytes += self._pending_bytes
        self._pending.clear()
        self._pending_bytes = 0


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file straight from the tensors' memory.

    The library's own writer makes a copy of everything first. As there, large elements come first,
    so that every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        dtype = _TYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        handle.flush()
        os.fsync(handle.fileno())


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are, without a mask of the whole tensor."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_CHECK_VALUES))


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / INDEX_FILE
    if not index.exists():
        single = folder / SINGLE_FILE
        if not single.exists():
            pickled = any(any(folder.glob(f"*.{end}")) for end in ("bin", "pth", "pt"))
            raise CheckpointError(
                f"{folder} holds no weights",
                found="pickled weights, which are never loaded" if pickled else None,
                allowed=f"{SINGLE_FILE}, or {INDEX_FILE} with its shards",
                hint="save the model with safe_serialization" if pickled else None,
            )
        yield single
        return
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map", hint="get the file again")
    for name in weight_map.values():
        is_plain = isinstance(name, str) and Path(name).name == name not in ("", "..")
        if not is_plain:
            raise CheckpointError(
                f"{index} names a file outside its folder",
                found=name,
                allowed="plain file names",
                hint="get the file again, from a source you trust",
            )
    for name in sorted(set(weight_map.values())):
        shard = folder / name
        if not shard.exists():
            missing = [tensor for tensor, file in weight_map.items() if file == name]
            raise CheckpointError(
                f"the shard {shard} is missing",
                found=f"{index.name} expects {len(missing)} tensors in it, such as {missing[0]}",
                hint="get the file again",
            )
        yield shard


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes, after checking that the file is whole."""
    try:
        with safe_open(file, framework="pt"):
            pass  # the library checks the header against the file's size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(min(length, _MAX_HEADER_BYTES)))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file",
            found=f"{file.stat().st_size} bytes: {error}",
            hint="get the file again; it may have been cut off while downloading",
        ) from None
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
