"""Model families: one file each.

A family says which `model_type`s it answers to, reads their config.json, and builds the layers. Any
module in this folder that defines a `Family` subclass is found by itself: CONTRIBUTING.md shows how
to add one.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from mla_deploy.config import MlaConfig
from mla_deploy.config_reader import ConfigReader, read_json_object
from mla_deploy.errors import ConfigError
from mla_deploy.families.base import Family

__all__ = ["CONVERTIBLE", "Family", "families", "family_of", "load_config"]

CONVERTIBLE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Types of models whose attention `mla-deploy convert` makes latent."""


@functools.cache
def families() -> dict[str, Family]:
    """Every family, by each `model_type` it answers to."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        name = f"{__name__}.{module.name}"
        for value in vars(importlib.import_module(name)).values():
            is_family = isinstance(value, type) and issubclass(value, Family)
            if is_family and value.__module__ == name and value is not Family:
                found.update(dict.fromkeys(value.model_types, value()))
    return found


def family_of(model_type: object, origin: str) -> Family:
    """The family that answers to a `model_type`.

    Raises:
        ConfigError: none does.
    """
    family = families().get(model_type) if isinstance(model_type, str) else None
    if family is None and model_type in CONVERTIBLE:
        raise ConfigError(
            f"{origin}: the attention of this model is not latent yet",
            found=model_type,
            hint="mla-deploy build MODEL -o BUNDLE --target-ratio 0.3125 --calibration TEXT, or "
            "mla-deploy convert",
        )
    if family is None:
        raise ConfigError(
            f"{origin}: this model_type is not known",
            found=model_type,
            allowed=", ".join(sorted(families())),
            hint="add a family: CONTRIBUTING.md",
        )
    return family


def load_config(path: Path | str) -> MlaConfig:
    """Read the config.json of a checkpoint folder, or the file itself.

    Raises:
        ConfigError: missing, broken, of an unknown model_type, or with values or keys that are not
            supported.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    raw = read_json_object(file)
    reader = ConfigReader(raw, str(file))
    config = family_of(raw.get("model_type"), str(file)).read_config(reader)
    reader.finish()
    return config
