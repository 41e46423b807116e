"""The recipe: how a checkpoint was quantised, written into its config.json.

A checkpoint without one is an ordinary Hugging Face checkpoint in floating point; its cache is then
kept in float32, so that it serves as the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mla_deploy.errors import ConfigError

RECIPE_KEY = "mla_deploy"
RECIPE_VERSION = 1


@dataclass(frozen=True)
class WeightFormat:
    """How one kind of matrix is stored; `mla_deploy.packing` has the layout."""

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
class Recipe:
    """What was done to a checkpoint. None for a kind of matrix: kept in floating point."""

    cache_format: str = "fp32"
    linear: WeightFormat | None = None
    experts: WeightFormat | None = None
    embedding: WeightFormat | None = None
    lm_head: WeightFormat | None = None
    gamma_folded: bool = False
    """The norm weight of the latent is already in w_uk and w_uv."""
    latent_rotation: int | None = None
    """Block size of the Hadamard rotation of the latent, folded into kv_a, w_uk and w_uv."""
    half_precision: bool = False
    """Float matrices that are read by rows or per head (embedding, w_uk, w_uv) are in float16."""

    @property
    def table_dtype(self) -> torch.dtype:
        """Type of the float matrices that `half_precision` speaks of."""
        return torch.float16 if self.half_precision else torch.float32

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
            for kind in ("linear", "experts", "embedding", "lm_head"):
                if values.get(kind) is not None:
                    values[kind] = WeightFormat(**values[kind])
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{origin}: the recipe cannot be read", found=error) from None
