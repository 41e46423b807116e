"""What a config.json says of rotary positions."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from mla_deploy.config_reader import ConfigReader
from mla_deploy.errors import ConfigError


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023) as transformers parametrises it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024), with one list of factors for all positions."""

    factors: tuple[float, ...]
    """What the wavelength of each pair is multiplied by."""
    attention_factor: float
    """What cos and sin are multiplied by."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions of the `qk_rope_head_dim` channels."""

    theta: float
    yarn: YarnScaling | None
    longrope: LongRopeScaling | None = None
    inv_freq: tuple[tuple[float, ...], ...] | None = None
    """Radians a position of each pair, layer by layer, where layers differ; then nothing else here
    says anything."""


KINDS = ("default", "yarn", "longrope")


def read_rope(keys: ConfigReader) -> RopeConfig:
    """The rotary positions of a config.json."""
    kind, theta, nested = read_rope_kind(keys, KINDS)
    rope = RopeConfig(
        theta=theta,
        yarn=_read_yarn(nested) if kind == "yarn" else None,
        longrope=_read_longrope(nested, keys) if kind == "longrope" else None,
    )
    nested.finish()
    return rope


def read_rope_kind(
    keys: ConfigReader, kinds: Collection[str], default_theta: float = 1e4
) -> tuple[str, float, ConfigReader]:
    """`rope_parameters`, or the older `rope_theta` with `rope_scaling`.

    Returns:
        The kind of scaling, theta, and a reader of the scaling's own keys, to be finished.

    Raises:
        ConfigError: a kind that is none of `kinds`, or values out of range.
    """
    raw = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    keys.get("rope_scaling")
    origin = f"{keys.origin}, rope scaling"
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin} has the wrong type", found=raw, allowed="an object, or null")
    nested = ConfigReader(raw, origin, neutral=frozenset({"rope_type", "type"}))
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(
            f"{keys.origin}: this rope scaling is not supported",
            found=kind,
            allowed=", ".join(kinds),
        )
    nested.expect("partial_rotary_factor", 1.0, None)
    theta = nested.positive("rope_theta", keys.positive("rope_theta", default_theta), above=1.0)
    return kind, theta, nested


def _read_yarn(nested: ConfigReader) -> YarnScaling:
    return YarnScaling(
        factor=nested.positive("factor"),
        original_max_position_embeddings=_trained_context(nested),
        beta_fast=nested.positive("beta_fast", 32.0),
        beta_slow=nested.positive("beta_slow", 1.0),
        mscale=nested.number("mscale", 0.0),
        mscale_all_dim=nested.number("mscale_all_dim", 0.0),
    )


def _read_longrope(nested: ConfigReader, keys: ConfigReader) -> LongRopeScaling:
    """Where the factors change at a length, keys in the cache would have to be turned again."""
    pairs = keys.integer("qk_rope_head_dim") // 2
    context = keys.integer("max_position_embeddings")
    trained = _trained_context(nested)
    short, long = (
        nested.numbers(name, pairs, "one for each pair of rotary channels")
        for name in ("short_factor", "long_factor")
    )
    if short != long and context > trained:
        raise ConfigError(
            f"{keys.origin}: the rope scaling has other factors from {trained} tokens on, so that "
            "keys in the cache would change",
            found=f"max_position_embeddings {context}",
            allowed=f"up to {trained}, or equal short_factor and long_factor",
            hint=f"set max_position_embeddings to {trained}, or long_factor in both places for a "
            "model that is used at long contexts",
        )
    factor = nested.positive("factor", context / trained)
    longer = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return LongRopeScaling(short, nested.positive("attention_factor", longer))


def _trained_context(nested: ConfigReader) -> int:
    key = "original_max_position_embeddings"
    tokens = nested.integer(key)
    if tokens < 2:
        raise ConfigError(f"{nested.origin}: {key} is too small", found=tokens, allowed="2 or more")
    return tokens
