"""Reading a config.json key by key.

A key that nobody reads could change what the model computes, so it is an error, not a warning.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mla_deploy.errors import ConfigError

T = TypeVar("T")
LARGEST = 2**31 - 1
"""Of whole numbers."""

PROVENANCE_KEY = "conversion"
"""How `mla-deploy convert` made a model."""

NEUTRAL_KEYS = frozenset(
    {
        PROVENANCE_KEY,
        "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
        "attn_implementation", "auto_map", "aux_loss_alpha", "dtype", "ep_size", "head_dim",
        "initializer_range", "model_max_length", "model_type", "num_mtp_layers",
        "num_nextn_predict_layers", "output_router_logits", "pad_token_id", "pretraining_tp",
        "qk_head_dim", "seq_aux", "torch_dtype", "transformers.js_config", "transformers_version",
        "unsloth_version", "use_cache",
    }
)  # fmt: skip
"""Keys that do not change what a forward pass computes, or that repeat what other keys say."""


class ConfigReader:
    """Hands out the keys of a config.json and remembers which were read."""

    def __init__(
        self, raw: Mapping[str, Any], origin: str, *, neutral: frozenset[str] = NEUTRAL_KEYS
    ) -> None:
        """neutral: keys that nobody has to read."""
        self._raw = dict(raw)
        self._left = set(raw) - neutral
        self.origin = origin

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._typed(key, int, default)
        if abs(value) > LARGEST:
            raise self._out_of_range(key, value, f"-{LARGEST} to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._typed(key, (int, float), default)
        if not _is_number(value):
            raise self._out_of_range(key, value, "a number that a float can hold")
        return float(value)

    def positive(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A number above zero, or above another."""
        value = self.number(key, default)
        if not above < value:
            raise self._out_of_range(key, value, f"above {above:g}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._typed(key, bool, default)

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, default)

    def optional_integer(self, key: str) -> int | None:
        return None if self.get(key) is None else self.integer(key)

    def numbers(self, key: str, count: int, which: str) -> tuple[float, ...]:
        """A list of so many positive numbers; `which` says what they belong to."""
        value = self._typed(key, list, None)
        if len(value) != count or not all(_is_number(one) and one > 0 for one in value):
            raise ConfigError(
                f"{self.origin}: {key} is not such a list as it must be",
                found=json.dumps(value)[:80],
                allowed=f"{count} positive numbers, {which}",
            )
        return tuple(float(one) for one in value)

    def token_id(self, key: str) -> int | None:
        """A token id, if there is one."""
        value = self.get(key)
        return None if value is None else self._token_id(key, value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or none."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self._token_id(key, one) for one in ids)

    def get(self, key: str) -> Any:
        """The raw value, or None; counts as read."""
        self._left.discard(key)
        return self._raw.get(key)

    def expect(self, key: str, *allowed: Any) -> None:
        """Accept a key whose value we support only in part; a missing key is fine."""
        value = self.get(key)
        if key in self._raw and value not in allowed:
            raise ConfigError(
                f"{self.origin}: {key} has a value that is not supported",
                found=json.dumps(value),
                allowed=" or ".join(json.dumps(one) for one in allowed),
            )

    def finish(self) -> None:
        """Refuse keys that nobody read; null is as good as absent."""
        left = sorted(key for key in self._left if self._raw[key] is not None)
        if left:
            raise ConfigError(
                f"{self.origin} has keys that could change the result and are not known",
                found=", ".join(left),
                hint="remove a key that does not matter, or teach the family to read it "
                "(CONTRIBUTING.md)",
            )

    def _token_id(self, key: str, value: Any) -> int:
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise ConfigError(
                f"{self.origin}: {key} holds what is no token id",
                found=str(value)[:40],
                allowed=f"0 to {LARGEST}",
            )
        return value

    def _out_of_range(self, key: str, value: float, allowed: str) -> ConfigError:
        what = f"{self.origin}: {key} is out of range"
        return ConfigError(what, found=str(value)[:40], allowed=allowed)

    def _typed(self, key: str, kind: type[T] | tuple[type, ...], default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.origin}: {key} is missing", hint="get the file again")
        is_bool_for_number = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or is_bool_for_number:
            expected = kind.__name__ if isinstance(kind, type) else "number"
            raise ConfigError(
                f"{self.origin}: {key} has the wrong type",
                found=json.dumps(value),
                allowed=expected,
            )
        return value


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Raises:
        ConfigError: missing or broken.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist", hint="name the folder of a Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, no JSON, a huge integer
        raise ConfigError(
            f"{file} cannot be read as JSON", found=error, hint="get the file again"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{file} holds no object", found=type(raw).__name__, hint="get the file again"
        )
    return raw


def _is_number(value: Any) -> bool:
    """Whether it is one that a float can hold."""
    is_kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_kind and abs(value) <= sys.float_info.max
