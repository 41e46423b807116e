"""Writing checkpoints: safetensors in numbered files, tensor by tensor."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mla_deploy.checkpoint import INDEX_FILE, read_header
from mla_deploy.output import whole_file

_SHARD_BYTES = 128 << 20
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


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
            for name, info in read_header(file).items():
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
        with whole_file(self._folder / INDEX_FILE) as file:
            file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def flush(self) -> None:
        """Write the tensors taken so far into a shard, however small."""
        if not self._pending:
            return
        self._shards += 1
        name = f"model-{self._shards:05d}.safetensors"
        with whole_file(self._folder / name) as file:
            _save(self._pending, file)
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
