"""Which cache every layer gets, decided by a calibration, and by a budget if there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mla_deploy.cache import cache_record
from mla_deploy.config import MlaConfig
from mla_deploy.errors import ConfigError
from mla_deploy.model import load_model
from mla_deploy.output import whole_file, writing
from mla_deploy.progress import Progress
from mla_deploy.quant.allocate import Choice, Point, allocate, decide
from mla_deploy.quant.calibrate import (
    AUTO_FORMATS,
    CacheChoice,
    Calibration,
    calibrate,
    joint_divergence,
)
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.fold import LatentRotation
from mla_deploy.recipe import CALIBRATION_FILE

AXES_FILE = "axes.safetensors"
"""In the partial folder: the balanced axes, which are in the weights at the end."""


@dataclass(frozen=True)
class CacheChoices:
    """What was measured and what follows."""

    calibration: Calibration
    chosen: tuple[CacheChoice, ...]
    """For each layer."""
    rotations: tuple[LatentRotation | None, ...]
    budget: float | None = None
    """Bytes a token and layer, on average."""
    points: tuple[Point, ...] = field(default=())
    """Their size is bytes a token and layer."""

    @property
    def bytes_per_layer(self) -> float:
        """A token and layer, on average."""
        return sum(choice.bytes for choice in self.chosen) / len(self.chosen)

    def to_json(self) -> dict[str, Any]:
        """For `calibration.json` and `--json`: all but the matrices."""
        return {
            **self.calibration.to_json(),
            "chosen": [asdict(choice) for choice in self.chosen],
            "budget": self.budget,
            "bytes_per_layer": self.bytes_per_layer,
            "points": [asdict(point) for point in self.points],
        }


def auto_formats(config: MlaConfig) -> tuple[str, ...]:
    """The formats of `--kv auto` that can hold this latent."""
    fitting = []
    for name in AUTO_FORMATS:
        try:
            cache_record(name).parts(config.kv_lora_rank, config.qk_rope_head_dim)
        except ConfigError:
            continue
        fitting.append(name)
    return tuple(fitting)


def check_budget(config: MlaConfig, budget: float) -> None:
    """Raise a UsageError that says the minimum, if the budget is below it."""
    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    costs = [cache_record(name).bytes_per_token(*sizes) for name in auto_formats(config)]
    layer = [Choice(str(cost), cost, 0.0) for cost in costs]
    allocate([layer] * config.num_hidden_layers, budget * config.num_hidden_layers)


def choose_cache(
    source: Path,
    config: MlaConfig,
    text: CalibrationText,
    formats: Sequence[str] | None,
    budget: float | None,
    rotate: bool | None,
    progress: Progress | None = None,
) -> CacheChoices:
    """Calibrate a checkpoint and decide.

    Args:
        config: of the unquantised model.
        formats: the record of each layer; None: to be chosen.
        budget: bytes a token and layer on average, where they are chosen.
        rotate: as in `calibrate`.
    """
    model = load_model(source)
    if formats is None:
        every_format: list[Sequence[str]] = [auto_formats(config)] * config.num_hidden_layers
    else:
        every_format = [(name,) for name in formats]
    measured, tried = calibrate(
        model,
        config,
        text,
        every_format,
        rotate=rotate,
        measures_kl=formats is None,
        progress=progress,
    )

    def caches(chosen: Sequence[int]) -> list[tuple[str, LatentRotation | None]]:
        picked = [layer[index] for layer, index in zip(measured.layers, chosen, strict=True)]
        return [(one.format, tried[at][one.rotation]) for at, one in enumerate(picked)]

    points: tuple[Point, ...] = ()
    chosen: Sequence[int]
    if formats is not None:
        chosen = [0] * len(formats)
    else:
        assert budget is not None
        items = [
            [Choice(one.format, one.bytes, one.kl or 0.0) for one in layer]
            for layer in measured.layers
        ]

        def measure(candidates: Sequence[Sequence[int]]) -> list[float]:
            every = [caches(one) for one in candidates]
            return joint_divergence(model, config, text, every, progress)

        chosen, points = decide(items, budget * len(items), len(items), measure)
    picked = tuple(layer[index] for layer, index in zip(measured.layers, chosen, strict=True))
    rotations = tuple(rotation for _, rotation in caches(chosen))
    return CacheChoices(measured, picked, rotations, budget, points)


def save_choices(folder: Path, choices: CacheChoices) -> None:
    """Write both files; the JSON last, so that it says that the other is whole."""
    axes = {
        str(layer): rotation.axes
        for layer, rotation in enumerate(choices.rotations)
        if rotation is not None and rotation.axes is not None
    }
    blocks = [None if one is None else one.block for one in choices.rotations]
    text = json.dumps({**choices.to_json(), "blocks": blocks}, indent=1) + "\n"
    with writing(folder):
        save_file(axes, folder / AXES_FILE)
    with whole_file(folder / CALIBRATION_FILE) as file:
        file.write_text(text, encoding="utf-8")


def load_choices(folder: Path) -> CacheChoices | None:
    """What `save_choices` wrote; None if it did not come to that."""
    file = folder / CALIBRATION_FILE
    if not file.exists():
        return None
    raw: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    axes: dict[str, torch.Tensor] = load_file(folder / AXES_FILE)
    return CacheChoices(
        Calibration.from_json(raw),
        tuple(CacheChoice(**one) for one in raw["chosen"]),
        tuple(
            None if block is None else LatentRotation(block, axes.get(str(layer)))
            for layer, block in enumerate(raw["blocks"])
        ),
        raw["budget"],
        tuple(Point(**one) for one in raw["points"]),
    )
