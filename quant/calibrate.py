"""Calibration: what each way of caching costs each layer, measured on a text.

The unquantised model runs in float32, window by window. Of every layer and cache record is measured

- as the latent is, rotated by Hadamard blocks, and turned to balanced axes before that: the
  signal-to-noise ratio of the latent, and the relative error of the attention block's output, the
  smallest of which decides;
- with that decision: the KL divergence of the model's prediction when this layer alone has that
  cache. A layer is run again from its own input, so this costs half the model on average.

Needs the whole model in memory, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mla_deploy.cache import cache_record
from mla_deploy.config import MlaConfig
from mla_deploy.modules.decoder import Decoder
from mla_deploy.progress import Progress
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.fold import LatentRotation, balanced_axes, hadamard_block, latent_sensitivity
from mla_deploy.quant.window_run import EXACT, WindowRun, divergence, rotated

AUTO = "auto"
AUTO_FORMATS = ("int2", "int3", "int4", "int4-g32", "int8", "fp16")
"""What `--kv auto` chooses from."""


@dataclass(frozen=True)
class CacheChoice:
    """One cache record in one layer."""

    format: str
    bytes: int
    """Per token."""
    rotation: str
    """The one that was best: `none`, `hadamard` or `balanced`."""
    sqnr_db: dict[str, float]
    """Of the latent, by rotation."""
    output_error: dict[str, float]
    """Of the attention block, |difference| / |output|, by rotation."""
    kl: float | None
    """Mean KL divergence of the prediction if only this layer is cached so; None: not measured."""


@dataclass(frozen=True)
class Calibration:
    """All that was measured."""

    tokens: int
    window: int
    layers: tuple[tuple[CacheChoice, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """For `calibration.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Calibration:
        """What `to_json` gave."""
        layers = tuple(tuple(CacheChoice(**one) for one in layer) for layer in raw["layers"])
        return cls(raw["tokens"], raw["window"], layers)


@torch.no_grad()
def calibrate(
    model: Decoder,
    config: MlaConfig,
    text: CalibrationText,
    formats: Sequence[Sequence[str]],
    *,
    rotate: bool | None = None,
    measures_kl: bool = True,
    progress: Progress | None = None,
) -> tuple[Calibration, list[dict[str, LatentRotation | None]]]:
    """Measure formats of the cache in every layer.

    Args:
        model: unquantised, with its weights.
        formats: for each layer names of cache records, all of which can hold this latent.
        rotate: None lets the error decide between all rotations and none; True: only between
            rotations; False: none.
        measures_kl: without, `CacheChoice.kl` stays None.

    Returns:
        What was measured, and the rotations that were tried in each layer, by name.
    """
    layers = config.num_hidden_layers
    total = len(text.windows) * (2 * layers + sum(map(len, formats)) * measures_kl)
    done = 0

    def move(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    axes = _balanced_axes(model, config, text, move)
    rotations = _rotations(config, axes, rotate)
    errors = _Errors(config, formats, rotations)
    for ids in text.windows:
        run = WindowRun(model, config, ids)
        for layer, (x, residual) in enumerate(run.layer_inputs()):
            errors.add(run, layer, x, residual)
            move(f"error of layer {layer}")
    decided = errors.decide()
    summed = [[0.0] * len(names) for names in formats]
    positions = sum(len(ids) for ids in text.windows)
    for ids in text.windows if measures_kl else ():
        run = WindowRun(model, config, ids)
        inputs = list(run.layer_inputs())
        expected = run.log_probabilities(*run.layer(layers - 1, *inputs[-1]))
        for layer, (x, residual) in enumerate(inputs):
            for index, name in enumerate(formats[layer]):
                rotation = rotations[layer][decided[layer][index]]
                with rotated(run.attention(layer), rotation):
                    found = run.layer(layer, x, residual, name)
                for later in range(layer + 1, layers):
                    found = run.layer(later, *found)
                summed[layer][index] += divergence(expected, run.log_probabilities(*found))
                move(f"divergence of {name} in layer {layer}")
    return Calibration(
        tokens=positions,
        window=max(len(ids) for ids in text.windows),
        layers=tuple(
            tuple(
                errors.choice(
                    layer,
                    index,
                    decided[layer][index],
                    summed[layer][index] / positions if measures_kl else None,
                )
                for index in range(len(formats[layer]))
            )
            for layer in range(layers)
        ),
    ), rotations


@torch.no_grad()
def joint_divergence(
    model: Decoder,
    config: MlaConfig,
    text: CalibrationText,
    caches: Sequence[Sequence[tuple[str, LatentRotation | None]]],
    progress: Progress | None = None,
) -> list[float]:
    """Mean KL divergence for each list of caches, a record and a rotation for every layer."""
    sums = [0.0] * len(caches)
    for place, ids in enumerate(text.windows):
        run = WindowRun(model, config, ids)
        (*_, last) = run.layer_inputs()
        expected = run.log_probabilities(*run.layer(config.num_hidden_layers - 1, *last))
        for index, layers in enumerate(caches):
            state: tuple[torch.Tensor, torch.Tensor | None] = run.start
            for layer, (name, rotation) in enumerate(layers):
                with rotated(run.attention(layer), rotation):
                    state = run.layer(layer, *state, name)
            x, residual = state
            assert residual is not None
            sums[index] += divergence(expected, run.log_probabilities(x, residual))
            if progress is not None:
                done = place * len(caches) + index + 1
                progress(done, len(text.windows) * len(caches), "allocations")
    positions = sum(len(ids) for ids in text.windows)
    return [one / positions for one in sums]


def _rotations(
    config: MlaConfig, axes: Sequence[torch.Tensor], rotate: bool | None
) -> list[dict[str, LatentRotation | None]]:
    """What is tried in each layer."""
    block = hadamard_block(config.kv_lora_rank)
    tried: list[dict[str, LatentRotation | None]] = []
    for matrix in axes:
        named = {
            "none": None,
            "hadamard": LatentRotation(block),
            "balanced": LatentRotation(block, matrix),
        }
        if rotate is not None:
            named = {name: one for name, one in named.items() if (one is not None) == rotate}
        tried.append(named)
    return tried


def _balanced_axes(
    model: Decoder, config: MlaConfig, text: CalibrationText, move: Callable[[str], None]
) -> list[torch.Tensor]:
    rank = config.kv_lora_rank
    sums = [torch.zeros(rank, rank, dtype=torch.float64) for _ in range(config.num_hidden_layers)]
    for ids in text.windows:
        run = WindowRun(model, config, ids)
        for layer, (x, residual) in enumerate(run.layer_inputs()):
            c_kv, _ = run.latents(layer, run.normed(layer, x, residual))
            sums[layer] += (c_kv.T @ c_kv).double()
            move(f"axes of layer {layer}")
    found = []
    for layer, covariance in enumerate(sums):
        block = run.attention(layer)
        w_uk, w_uv = block.get_parameter("w_uk"), block.get_parameter("w_uv")
        sensitivity = latent_sensitivity(w_uk, w_uv, block.o_proj.weight)
        found.append(balanced_axes(covariance, sensitivity))
    return found


class _Errors:
    """Sums of squares by layer, format and rotation."""

    def __init__(
        self,
        config: MlaConfig,
        formats: Sequence[Sequence[str]],
        rotations: Sequence[dict[str, LatentRotation | None]],
    ) -> None:
        self.config, self.formats, self.rotations = config, formats, rotations
        self.latent, self.output = (  # of each layer [formats, rotations]
            [torch.zeros(len(names), len(rotations[0]), dtype=torch.float64) for names in formats]
            for _ in range(2)
        )
        self.latent_total, self.output_total = ([0.0] * len(formats) for _ in range(2))

    def add(
        self, run: WindowRun, layer: int, x: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        normed = run.normed(layer, x, residual)
        expected = run.attend(layer, normed, EXACT)
        self.output_total[layer] += _squares(expected)
        self.latent_total[layer] += _squares(run.latents(layer, normed)[0])
        for place, rotation in enumerate(self.rotations[layer].values()):
            with rotated(run.attention(layer), rotation):
                c_kv, k_pe = run.latents(layer, normed)
                for index, name in enumerate(self.formats[layer]):
                    record = cache_record(name)
                    stored = [part.unsqueeze(0) for part in record.encode(c_kv, k_pe)]
                    restored, _ = record.decode(stored, torch.float32)
                    self.latent[layer][index, place] += _squares(restored[0] - c_kv)
                    found = run.attend(layer, normed, name)
                    self.output[layer][index, place] += _squares(found - expected)

    def decide(self) -> list[list[str]]:
        """The best rotation of each layer and format."""
        names = list(self.rotations[0])
        return [[names[place] for place in layer.argmin(-1).tolist()] for layer in self.output]

    def choice(self, layer: int, index: int, rotation: str, kl: float | None) -> CacheChoice:
        sizes = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        name = self.formats[layer][index]
        noise = self.output[layer][index] / self.output_total[layer]
        ratio = self.latent_total[layer] / self.latent[layer][index].clamp_min(1e-30)
        names = list(self.rotations[layer])
        return CacheChoice(
            format=name,
            bytes=cache_record(name).bytes_per_token(*sizes),
            rotation=rotation,
            sqnr_db=dict(zip(names, (10 * ratio.log10()).tolist(), strict=True)),
            output_error=dict(zip(names, noise.sqrt().tolist(), strict=True)),
            kl=kl,
        )


def _squares(x: torch.Tensor) -> float:
    return float(x.double().square().sum())
