"""What an unfinished conversion leaves in its folder beside the shards, so that it can go on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mla_deploy.config_reader import read_json_object
from mla_deploy.output import whole_file, writing
from mla_deploy.quant.compress.geometry import Geometry
from mla_deploy.quant.compress.heal import Curve, Student
from mla_deploy.quant.compress.layer import LatentWeights
from mla_deploy.quant.compress.report import LayerReport
from mla_deploy.quant.compress.streams import Streams

_LATENT = "latent."
_PROJECTION = "projection."
_LAYERS, _GEOMETRY, _DISTILLATION = "layers.jsonl", "geometry.json", "distillation.safetensors"
SCRATCH = (_LAYERS, _GEOMETRY, _DISTILLATION, "streams-*", "student-*")
"""All of it, which the result is whole without."""


class Partial:
    """Small files; each appears under its name only when it is whole.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._layers = folder / _LAYERS
        self._geometry = folder / _GEOMETRY
        self.distillation = folder / _DISTILLATION

    def geometry(self) -> Geometry | None:
        """The size that was chosen by trial."""
        if not self._geometry.exists():
            return None
        return Geometry(**read_json_object(self._geometry))

    def keep_geometry(self, geometry: Geometry) -> None:
        with whole_file(self._geometry) as file:
            file.write_text(json.dumps(dataclasses.asdict(geometry)))

    def reports(self) -> list[LayerReport]:
        """Of the layers converted, in order; the last word on each."""
        found: dict[int, LayerReport] = {}
        lines = self._layers.read_text().splitlines() if self._layers.exists() else []
        for line in lines:
            try:
                raw = json.loads(line)
            except ValueError:  # a kill may have cut off a line
                continue
            raw["inv_freq"] = tuple(raw["inv_freq"])
            raw["match"] = None if raw["match"] is None else Curve(**raw["match"])
            found[raw["layer"]] = LayerReport(**raw)
        return [found[layer] for layer in sorted(found)]

    def keep_report(self, report: LayerReport) -> None:
        with writing(self.folder), self._layers.open("a") as handle:
            handle.write("\n" + json.dumps(dataclasses.asdict(report)))

    def streams(self, layers: int) -> tuple[Streams, int] | None:
        """The hidden states in front of the first layer to do, and that layer's number."""
        for first in range(layers, 0, -1):
            if self._streams(first).exists():
                return Streams.load(self._streams(first)), first
        return None

    def keep_streams(self, streams: Streams, first: int) -> None:
        """They replace those in front of the layer before."""
        streams.save(self._streams(first))
        self._streams(first - 1).unlink(missing_ok=True)

    def student(self, layer: int) -> Student:
        """The attention of a layer that waits to be healed further."""
        with safe_open(self._student(layer), framework="pt") as handle:
            scale = float(handle.get_tensor("softmax_scale"))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118

        def part(prefix: str) -> dict[str, object]:
            return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}

        latent = LatentWeights(**part(_LATENT), softmax_scale=scale)  # type: ignore[arg-type]
        return Student(latent, part(_PROJECTION))  # type: ignore[arg-type]

    def has_student(self, layer: int) -> bool:
        return self._student(layer).exists()

    def keep_student(self, layer: int, student: Student) -> None:
        tensors = {_LATENT + name: x for name, x in student.latent.tensors().items()}
        tensors |= {_PROJECTION + name: x for name, x in student.projections.items()}
        tensors["softmax_scale"] = torch.tensor(student.latent.softmax_scale, dtype=torch.float64)
        with whole_file(self._student(layer)) as file:
            save_file({name: x.contiguous() for name, x in tensors.items()}, file)

    def _streams(self, first: int) -> Path:
        return self.folder / f"streams-{first:05d}.safetensors"

    def _student(self, layer: int) -> Path:
        return self.folder / f"student-{layer:05d}.safetensors"
