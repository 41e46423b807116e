"""`MlaConfig`: what a model is, read from a Hugging Face config.json and checked.

A key that nobody reads could change what the model computes, so it is an error, not a warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mla_deploy.errors import ConfigError
from mla_deploy.recipe import RECIPE_KEY, Recipe

T = TypeVar("T")

PROVENANCE_KEY = "conversion"
"""How `mla-deploy convert` made a model."""

NEUTRAL_KEYS = frozenset(
    {
        PROVENANCE_KEY,
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "aux_loss_alpha",
        "dtype", "ep_size", "head_dim", "initializer_range", "model_type", "num_mtp_layers",
        "num_nextn_predict_layers", "output_router_logits", "pad_token_id", "pretraining_tp",
        "qk_head_dim", "seq_aux", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Keys that do not change what a forward pass computes, or that repeat what other keys say."""


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
class RopeConfig:
    """Rotary positions of the `qk_rope_head_dim` channels."""

    theta: float
    yarn: YarnScaling | None
    inv_freq: tuple[tuple[float, ...], ...] | None = None
    """Radians a position of each pair, layer by layer, where layers differ; then `theta` and `yarn`
    say nothing."""


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in the layers from `first_k_dense_replace` on."""

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    moe_layer_freq: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    topk_method: str
    """`greedy`, `group_limited_greedy` or `noaux_tc`."""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether that layer has routed experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


@dataclass(frozen=True)
class MlaConfig:
    """A decoder with multi-head latent attention. Names are those of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    latent_norm_eps: float
    """Of the norms on the query latent and on c_kv; transformers fixes it to 1e-6."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    rope: RopeConfig
    moe: MoeConfig | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    source_quantization: str | None
    """The `quant_method` of weights that somebody else quantised; they cannot be read yet."""
    recipe: Recipe = field(default_factory=Recipe)
    has_latent_norm: bool = True
    """Whether c_kv is normalised before it is cached."""
    query_bias: bool = False
    """Whether `q_proj` has a bias too, where `attention_bias` gives the others one."""
    qk_norm_groups: int | None = None
    """Key heads of a model that normalises queries and keys by head before its rotary positions,
    as Qwen3 does; None: no such norms."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings"
        )
        for name in sizes.split():
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive", found=getattr(self, name))
        if self.qk_rope_head_dim % 2:
            raise ConfigError("qk_rope_head_dim must be even", found=self.qk_rope_head_dim)
        if self.moe is not None:
            _check_moe(self.moe)


class ConfigReader:
    """Hands out the keys of a config.json and remembers which were read."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self._raw = dict(raw)
        self._left = set(raw) - NEUTRAL_KEYS
        self.origin = origin

    def integer(self, key: str, default: int | None = None) -> int:
        return self._typed(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, (int, float), default))

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._typed(key, bool, default)

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, default)

    def optional_integer(self, key: str) -> int | None:
        return None if self.get(key) is None else self.integer(key)

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
        """Refuse keys that nobody read."""
        if self._left:
            raise ConfigError(
                f"{self.origin} has keys that could change the result and are not known",
                found=", ".join(sorted(self._left)),
                hint="remove a key that does not matter, or teach the family to read it "
                "(CONTRIBUTING.md)",
            )

    def _typed(self, key: str, kind: type[T] | tuple[type, ...], default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.origin}: {key} is missing")
        is_bool_for_number = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or is_bool_for_number:
            expected = kind.__name__ if isinstance(kind, type) else "number"
            raise ConfigError(
                f"{self.origin}: {key} has the wrong type",
                found=json.dumps(value),
                allowed=expected,
            )
        return value


def load_config(path: Path | str) -> MlaConfig:
    """Read the config.json of a checkpoint folder, or the file itself.

    Raises:
        ConfigError: missing, broken, of an unknown model_type, or with values or keys that are not
            supported.
    """
    from mla_deploy.families import family_of

    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    raw = read_json_object(file)
    reader = ConfigReader(raw, str(file))
    config = family_of(raw.get("model_type"), str(file)).read_config(reader)
    reader.finish()
    return config


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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON", found=error) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold an object", found=type(raw).__name__)
    return raw


def read_rope(keys: ConfigReader) -> RopeConfig:
    """`rope_parameters`, or the older `rope_theta` with `rope_scaling`."""
    scaling = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    keys.get("rope_scaling")
    theta = scaling.get("rope_theta", keys.get("rope_theta"))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(
            f"{keys.origin}: this rope scaling is not supported",
            found=kind,
            allowed="default, yarn",
        )
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    known |= {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    if unknown := sorted(set(scaling) - known):
        raise ConfigError(
            f"{keys.origin}: the rope scaling has keys that are not known",
            found=", ".join(unknown),
            allowed=", ".join(sorted(known)),
        )
    yarn = None
    if kind == "yarn":
        nested = ConfigReader(scaling, f"{keys.origin}, rope scaling")
        yarn = YarnScaling(
            factor=nested.number("factor"),
            original_max_position_embeddings=nested.integer("original_max_position_embeddings"),
            beta_fast=nested.number("beta_fast", 32.0),
            beta_slow=nested.number("beta_slow", 1.0),
            mscale=nested.number("mscale", 0.0),
            mscale_all_dim=nested.number("mscale_all_dim", 0.0),
        )
    return RopeConfig(theta=float(10000.0 if theta is None else theta), yarn=yarn)


def read_token_ids(value: Any) -> tuple[int, ...]:
    """A token id, a list of them, or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def read_moe(
    keys: ConfigReader, topk_method: str, *, norm_topk_prob: bool, first_k_dense_replace: int = 0
) -> MoeConfig | None:
    """The mixture of experts, or None where the config has no routed experts.

    The keyword arguments are the family's defaults for keys that are missing.
    """
    experts = keys.optional_integer("n_routed_experts")
    required = None if experts else 0
    moe = MoeConfig(
        n_routed_experts=experts or 0,
        n_shared_experts=keys.optional_integer("n_shared_experts") or 0,
        num_experts_per_tok=keys.integer("num_experts_per_tok", required),
        moe_intermediate_size=keys.integer("moe_intermediate_size", required),
        first_k_dense_replace=keys.integer("first_k_dense_replace", first_k_dense_replace),
        moe_layer_freq=keys.integer("moe_layer_freq", 1),
        n_group=keys.optional_integer("n_group") or 1,
        topk_group=keys.optional_integer("topk_group") or 1,
        norm_topk_prob=keys.flag("norm_topk_prob", norm_topk_prob),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
        topk_method=topk_method,
    )
    return moe if experts else None


def read_common(
    keys: ConfigReader, moe: MoeConfig | None, *, rms_norm_eps: float = 1e-6
) -> MlaConfig:
    """The keys that the MLA families share.

    Args:
        rms_norm_eps: the family's default.
    """
    heads = keys.integer("num_attention_heads")
    keys.expect("num_key_value_heads", heads, None)
    keys.expect("hidden_act", "silu")
    quantization = keys.get("quantization_config")
    return MlaConfig(
        model_type=keys.text("model_type"),
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=keys.integer("num_hidden_layers"),
        num_attention_heads=heads,
        q_lora_rank=keys.optional_integer("q_lora_rank"),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        v_head_dim=keys.integer("v_head_dim"),
        rms_norm_eps=keys.number("rms_norm_eps", rms_norm_eps),
        latent_norm_eps=1e-6,
        max_position_embeddings=keys.integer("max_position_embeddings"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        attention_bias=keys.flag("attention_bias", False),
        rope=read_rope(keys),
        moe=moe,
        bos_token_id=keys.optional_integer("bos_token_id"),
        eos_token_ids=read_token_ids(keys.get("eos_token_id")),
        source_quantization=(quantization or {}).get("quant_method"),
        recipe=Recipe.from_json(keys.get(RECIPE_KEY), keys.origin),
    )


def _check_moe(moe: MoeConfig) -> None:
    if moe.n_routed_experts % moe.n_group:
        raise ConfigError(
            "n_routed_experts must be a multiple of n_group",
            found=f"{moe.n_routed_experts} experts, {moe.n_group} groups",
        )
    reachable = moe.n_routed_experts // moe.n_group * moe.topk_group
    if not 0 < moe.num_experts_per_tok <= reachable:
        raise ConfigError(
            "num_experts_per_tok does not fit the experts in topk_group groups",
            found=moe.num_experts_per_tok,
            allowed=f"1 to {reachable}",
        )
