"""Checkpoints whose matrices the `hqq` package quantised, as transformers saves them.

A matrix X of 4 or 8 bit is stored in safetensors as

- `X.W_q` uint8: the codes [groups, group] in the order of the weights; at 4 bit byte i holds group
  i in its high nibble and group i + groups / 2 in its low one (`hqq.core.bitpack`);
- `X.scale`, `X.zero` [groups, 1]: `weight = (code - zero) * scale`;
- `X.shape`, `X.nbits`, `X.group_size`, `X.axis`, ... what was asked for, as small tensors.

Such a matrix is read as `X.weight`, and kept as it is where the recipe asks for its very format:
nothing is then quantised twice. Pickled checkpoints (`qmodel.pt`) are refused as all pickles are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open

from mla_deploy.checkpoint import Checkpoint, TensorInfo
from mla_deploy.errors import CheckpointError
from mla_deploy.families import load_config
from mla_deploy.packing import pack
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.weights import GROUPS, QuantizedMatrix
from mla_deploy.recipe import WeightFormat

METHOD = "hqq"
_PARTS = (
    "W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype",
    "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_PACKINGS = {4: b"4bit_u8", 8: b"8bit_u8"}


@dataclass(frozen=True)
class _Stored:
    """What the small tensors of a matrix say."""

    shape: tuple[int, int]
    bits: int
    group: int

    @property
    def groups(self) -> int:
        return math.prod(self.shape) // self.group


class HqqCheckpoint(Checkpoint):
    """Reads `X.weight` where the files hold `X.W_q` and its companions.

    Raises (on opening): as `Checkpoint`, and
        CheckpointError: a matrix that is not in the form above.
    """

    readable_quantization: ClassVar[str] = METHOD

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.config = replace(self.config, source_quantization=None)
        self._stored: dict[str, _Stored] = {}
        self._files: dict[str, Path] = {}
        names = [name.removesuffix(".W_q") for name in self.tensors if name.endswith(".W_q")]
        for name in names:
            stored = self._describe(name)
            self._stored[name] = stored
            parts = [self.tensors.pop(f"{name}.{part}", None) for part in _PARTS]
            size = sum(part.bytes for part in parts if part is not None)
            codes = parts[0]
            assert codes is not None
            self._files[name] = codes.file
            self.tensors[f"{name}.weight"] = TensorInfo(codes.file, "F32", stored.shape, size)

    @property
    def weight_format(self) -> WeightFormat | None:
        """The format that all quantised matrices have; None if they differ."""
        found = {(one.bits, one.group) for one in self._stored.values()}
        if len(found) != 1:
            return None
        ((bits, group),) = found
        return WeightFormat(bits, group, "exact")

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        base = name.removesuffix(".weight")
        if base not in self._stored:
            return super().read(name, shape)
        self.info(name, shape)
        codes, scale, zero = self._groups(base)
        return ((codes.float() - zero) * scale).reshape(self._stored[base].shape)

    def quantized(self, name: str, weight_format: WeightFormat) -> QuantizedMatrix | None:
        """A matrix as it is stored, if that is the format asked for.

        Args:
            name: with `.weight`.
        """
        base = name.removesuffix(".weight")
        stored = self._stored.get(base)
        if stored is None or weight_format != WeightFormat(stored.bits, stored.group, "exact"):
            return None
        codes, scale, zero = self._groups(base)
        rows = stored.shape[0]
        energy = float(((codes.float() - zero) * scale).double().square().sum())
        return QuantizedMatrix(
            pack(codes.reshape(stored.shape), stored.bits),
            scale.reshape(rows, -1).to(torch.float16),
            zero.reshape(rows, -1).to(torch.float16),
            squared_error=0.0,
            squared_sum=energy,
        )

    def _groups(self, base: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [groups, group] uint8, scale and zero [groups, 1] float32."""
        stored = self._stored[base]
        with safe_open(self._files[base], framework="pt") as file:
            packed, scale, zero = (file.get_tensor(f"{base}.{part}") for part in _PARTS[:3])
        if stored.bits == 4:
            packed = torch.cat((packed >> 4, packed & 15))
        scale, zero = scale.float(), zero.float()
        largest = float(torch.maximum(scale.abs().max(), zero.abs().max()))
        if not largest <= torch.finfo(torch.float16).max:  # also where it is NaN
            raise CheckpointError(
                f"{self.path}: the scales of {base} are not usable",
                found=f"{largest:.3g}",
                allowed="finite values that float16 holds",
                hint="get the file again",
            )
        return packed, scale, zero

    def _describe(self, base: str) -> _Stored:
        def wrong(found: object, allowed: str) -> CheckpointError:
            return CheckpointError(
                f"{self.path}: the hqq matrix {base} cannot be read",
                found=found,
                allowed=allowed,
                hint="quantise the original checkpoint with `mla-deploy quantize`",
            )

        values: dict[str, list[int]] = {}
        for part in ("shape", "nbits", "group_size", "axis", "packing"):
            info = self.tensors.get(f"{base}.{part}")
            if info is None or info.bytes > 1024:
                raise wrong(f"no {part}", "the layout of transformers' HqqConfig")
            with safe_open(info.file, framework="pt") as file:
                values[part] = file.get_tensor(f"{base}.{part}").reshape(-1).tolist()
        bits, group, axis = (values[name][0] for name in ("nbits", "group_size", "axis"))
        if bits not in _PACKINGS or bytes(values["packing"]) != _PACKINGS[bits]:
            raise wrong(f"{bits} bit", "4 or 8 bit")
        if axis != 1 or group not in GROUPS:
            allowed = f"axis 1, groups of {', '.join(map(str, GROUPS))}"
            raise wrong(f"axis {axis}, groups of {group}", allowed)
        if any(f"{base}.{part}" in self.tensors for part in ("scale_q", "zero_q")):
            raise wrong("scales that are quantised themselves", "plain scales and zeros")
        shape = values["shape"]
        if len(shape) != 2 or min(shape) < 1 or shape[1] % group:
            raise wrong(f"shape {shape}", "two axes, the second a multiple of the group")
        stored = _Stored((shape[0], shape[1]), bits, group)
        expected = {
            "W_q": (stored.groups * bits // 8, group),
            "scale": (stored.groups, 1),
            "zero": (stored.groups, 1),
        }
        for part, wanted in expected.items():
            info = self.tensors.get(f"{base}.{part}")
            if info is None or info.shape != wanted:
                raise wrong(f"{part} of shape {None if info is None else info.shape}", str(wanted))
            if (info.dtype == "U8") != (part == "W_q"):
                raise wrong(f"{part} of type {info.dtype}", "uint8 codes, float scales and zeros")
        return stored


def open_source(path: Path | str) -> Checkpoint:
    """The checkpoint to quantise: an ordinary one, or one of hqq's.

    Raises:
        ConfigError, CheckpointError: as the classes do.
    """
    quantization = load_config(Path(path)).source_quantization
    is_hqq = quantization is not None and quantization.method == METHOD
    return HqqCheckpoint(path) if is_hqq else Checkpoint(path)


def options_of_source(checkpoint: Checkpoint, options: QuantizeOptions) -> QuantizeOptions:
    """The options with the source's own weight format, where nothing else was asked for."""
    if not isinstance(checkpoint, HqqCheckpoint):
        return options
    own = checkpoint.weight_format
    is_free = options.group is None and options.zeros == "integer" and options.experts is None
    if own is None or not is_free or options.weights != f"int{own.bits}":
        return options
    return replace(options, group=own.group, zeros="exact")
