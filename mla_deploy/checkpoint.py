"""Reading checkpoints: safetensors, one file or many, tensor by tensor.

Nothing here ever holds more than a few tensors: reading opens a file anew after every
`_REOPEN_BYTES`, because pages of a mapped file count as the process's memory until it is unmapped.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from mla_deploy.block_scales import (
    METHOD,
    SCALE_SUFFIX,
    Block,
    SourceQuantization,
    scaled,
    scales_shape,
)
from mla_deploy.config import MlaConfig
from mla_deploy.config_reader import read_json_object
from mla_deploy.errors import CheckpointError
from mla_deploy.families import load_config
from mla_deploy.packing import SUFFIXES

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_REOPEN_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100 << 20
_CHECK_VALUES = 1 << 20
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ITEM_BYTES = {**_FLOAT_BYTES, "U8": 1}
_FLOAT8 = "F8_E4M3"
_RESAVE = (
    "save it anew, where you trust it: transformers' AutoModelForCausalLM.from_pretrained(MODEL)"
    ".save_pretrained(OUT), and copy the tokenizer"
)
_BYTES_IN = tuple(f".{part}" for part in SUFFIXES)
"""Ends of the names of tensors that may hold bytes: parts of quantised matrices."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is, known without reading it."""

    file: Path
    dtype: str
    """What it is read in, as safetensors spells it: F32, BF16, U8, ..."""
    shape: tuple[int, ...]
    bytes: int
    """In the file."""

    @property
    def read_bytes(self) -> int:
        """Once read."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class TensorFolder:
    """A folder with safetensors. Matrices of float8 with scales are read in float32.

    Args:
        quantization: what config.json says of weights that another tool quantised.

    Raises (on opening):
        CheckpointError: no weights, a missing shard, a file that is no safetensors, or a float8
            matrix whose scales are missing or of another shape.
    """

    def __init__(self, path: Path | str, quantization: SourceQuantization | None = None) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(self.path):
            self.tensors.update(read_header(file))
        self.scales: dict[str, TensorInfo] = {}
        """Of float8 matrices, by the matrix' name."""
        self._block = None if quantization is None else quantization.block
        if self._block is not None:
            self._pair_scales(self._block)
        self._open_file: Any = None
        self._open_path: Path | None = None
        self._bytes_since_open = 0

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor, in the type it is stored in, or float32 where that is float8.

        Args:
            name: as in the file.
            shape: what it must be.

        Raises:
            CheckpointError: missing, of another shape, of a type that is not supported, or with
                values that are not finite.
        """
        info = self.info(name, shape)
        tensor: torch.Tensor = self._file_of(info).get_tensor(name)
        if name in self.scales:
            assert self._block is not None
            scales = self._file_of(self.scales[name]).get_tensor(name + SCALE_SUFFIX)
            tensor = scaled(tensor, scales, self._block)
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
        allowed = _ITEM_BYTES if name.endswith(_BYTES_IN) else _FLOAT_BYTES
        if info.dtype not in allowed:
            raise CheckpointError(
                f"{info.file}: the tensor {name} has a type that is not supported",
                found=info.dtype,
                allowed=", ".join(sorted(allowed)),
            )
        return info

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare the headers with what a model needs; raises as `read` does."""
        for name, shape in shapes.items():
            self.info(name, shape)

    def _pair_scales(self, block: Block) -> None:
        """Take the scales of float8 matrices out of `tensors`."""
        for name in [name for name in self.tensors if name.endswith(SCALE_SUFFIX)]:
            scales = self.tensors.pop(name)
            base = name.removesuffix(SCALE_SUFFIX)
            matrix = self.tensors.get(base)
            if matrix is None or matrix.dtype != _FLOAT8 or len(matrix.shape) != 2:
                raise CheckpointError(
                    f"{scales.file}: {name} is no scale of a float8 matrix",
                    found="no such matrix" if matrix is None else f"{matrix.dtype} {matrix.shape}",
                    hint="get the checkpoint again",
                )
            wanted = scales_shape(matrix.shape, block)
            if scales.shape != wanted or scales.dtype not in _FLOAT_BYTES:
                raise CheckpointError(
                    f"{scales.file}: the scales {name} cannot be used",
                    found=f"{scales.dtype} {list(scales.shape)}",
                    allowed=f"{', '.join(sorted(_FLOAT_BYTES))}, {list(wanted)}",
                    hint="check that config.json belongs to these weights",
                )
            size = matrix.bytes + scales.bytes
            self.tensors[base] = replace(matrix, dtype="F32", bytes=size)
            self.scales[base] = scales

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

    readable_quantization: ClassVar[str] = METHOD
    """Whose quantised weights this class can read: `quant_method` in config.json."""

    def __init__(self, path: Path | str) -> None:
        self.config: MlaConfig = load_config(path)
        quantization = self.config.source_quantization
        refuse_quantized(quantization, path, self.readable_quantization)
        super().__init__(path, quantization)


def refuse_quantized(
    quantization: SourceQuantization | None, path: Path | str, readable: str = METHOD
) -> None:
    """Raise CheckpointError if the weights were quantised by another method than the readable."""
    if quantization is not None and quantization.method != readable:
        raise CheckpointError(
            f"{path} holds weights that another tool quantised",
            found=quantization.method,
            allowed="float16, bfloat16 or float32 weights, or float8 (e4m3) with scales of blocks",
            hint="take the unquantised checkpoint",
        )


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
                hint=_RESAVE if pickled else None,
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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes in a safetensors file, after checking that it is whole.

    Raises:
        CheckpointError: it is not.
    """
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
