"""The recipe: how a checkpoint was quantised, written into its config.json.

A checkpoint without one is an ordinary Hugging Face checkpoint in floating point; its cache is then
kept in float32, so that it serves as the reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mla_deploy.errors import ConfigError

RECIPE_KEY = "mla_deploy"
RECIPE_VERSION = 1
CALIBRATION_FILE = "calibration.json"
"""Beside config.json: what `quantize` measured of the cache; `eval --report` draws it."""
WEIGHT_BITS_FILE = "weight_bits.json"
"""The same of the matrices."""
_AS_WRITTEN = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class WeightFormat:
    """How one kind of matrix is stored; `mla_deploy.packing` has the layout."""

    __pydantic_config__ = _AS_WRITTEN

    bits: int
    """4 or 8."""
    group: int
    """Neighbours along the input that share a scale: 32, 64 or 128."""
    zeros: str = "integer"
    """`integer`: whole zeros, solved as such. `exact`: HQQ's real zeros in float16."""

    def __post_init__(self) -> None:
        allowed = {"bits": (4, 8), "group": (32, 64, 128), "zeros": ("integer", "exact")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"a weight format with this {name} is not supported",
                    found=getattr(self, name),
                    allowed=", ".join(map(str, values)),
                )


@dataclass(frozen=True)
class LayerRecipe:
    """What one layer has of its own, where layers differ."""

    __pydantic_config__ = _AS_WRITTEN

    cache_format: str
    latent_rotation: int | None
    balanced: bool
    linear: WeightFormat | None
    experts: WeightFormat | None


@dataclass(frozen=True)
class Recipe:
    """What was done to a checkpoint. None for a kind of matrix: kept in floating point."""

    __pydantic_config__ = _AS_WRITTEN

    cache_format: str = "fp32"
    linear: WeightFormat | None = None
    experts: WeightFormat | None = None
    embedding: WeightFormat | None = None
    lm_head: WeightFormat | None = None
    gamma_folded: bool = False
    """The norm weight of the latent is already in w_uk and w_uv."""
    latent_rotation: int | None = None
    """Block size of the Hadamard rotation of the latent, folded into kv_a, w_uk and w_uv."""
    balanced: bool = False
    """The rotation turns the latent to balanced axes first."""
    half_precision: bool = False
    """Float matrices that are read by rows or per head (embedding, w_uk, w_uv) are in float16."""
    layers: tuple[LayerRecipe, ...] = ()
    """One a layer where they differ; it then takes the place of the fields of the same name."""

    @property
    def table_dtype(self) -> torch.dtype:
        """Type of the float matrices that `half_precision` speaks of."""
        return torch.float16 if self.half_precision else torch.float32

    def of_layer(self, layer: int) -> Recipe:
        """The recipe of a model all of whose layers are like this one."""
        if not self.layers:
            return self
        own = self.layers[layer]
        return replace(
            self,
            cache_format=own.cache_format,
            latent_rotation=own.latent_rotation,
            balanced=own.balanced,
            linear=own.linear,
            experts=own.experts,
            layers=(),
        )

    def cache_formats(self, layers: int) -> tuple[str, ...]:
        """The cache record of each of so many layers."""
        return tuple(self.of_layer(layer).cache_format for layer in range(layers))

    def to_json(self) -> dict[str, Any]:
        """For config.json, under `RECIPE_KEY`."""
        return {"version": RECIPE_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None, origin: str) -> Recipe:
        """Read what `to_json` wrote; None gives the recipe of an ordinary checkpoint.

        Raises:
            ConfigError: of another version, or not what `to_json` writes.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"{origin}: the recipe must be an object",
                found=str(raw)[:80],
                hint="quantize the source model again",
            )
        values = dict(raw)
        version = values.pop("version", None)
        if version != RECIPE_VERSION:
            raise ConfigError(
                f"{origin}: the recipe is of another version",
                found=version,
                allowed=RECIPE_VERSION,
                hint="quantize the source model again with this mla-deploy",
            )
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigError(
                f"{origin}: the recipe cannot be read",
                found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                hint="quantize the source model again with this mla-deploy",
            ) from None
