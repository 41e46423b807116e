"""What is converted: a decoder with multi-head or grouped-query attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla_deploy.block_scales import read_quantization
from mla_deploy.checkpoint import TensorFolder, refuse_quantized
from mla_deploy.config_reader import ConfigReader, read_json_object
from mla_deploy.errors import CheckpointError, ConfigError
from mla_deploy.families import CONVERTIBLE, families
from mla_deploy.rope_config import read_rope_kind
from mla_deploy.unused import unused_tensors

_LLAMA3 = [
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
]  # fmt: skip
_YARN = [
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "truncate",
]  # fmt: skip
ROPE_KEYS = {"default": [], "linear": ["factor"], "llama3": _LLAMA3, "yarn": _YARN}
_DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NEUTRAL = ("is_llama_config", "mask_value", "max_window_layers", "tokenizer")
"""Keys that some files have and that change nothing here."""


@dataclass(frozen=True)
class SourceConfig:
    """A decoder of the Llama kind. Names are those of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    query_bias: bool
    """Of q_proj, k_proj and v_proj."""
    output_bias: bool
    """Of o_proj."""
    qk_norm: bool
    rope_theta: float
    rope_scaling: Mapping[str, Any]
    """With `rope_type`, and the keys that `ROPE_KEYS` names for it."""
    layers_without_rope: frozenset[int]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def attention_width(self) -> int:
        """Columns of o_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Rows of k_proj: G d."""
        return self.num_key_value_heads * self.head_dim

    @property
    def cached_numbers(self) -> int:
        """Numbers that a token leaves in the cache of one layer: keys and values."""
        return 2 * self.key_width

    def inverse_frequencies(self, layer: int) -> torch.Tensor:
        """Radians a position of each rotary pair. Shapes: to [d / 2] float32."""
        if layer in self.layers_without_rope:
            return torch.zeros(self.head_dim // 2)
        return inverse_frequencies(self.rope_theta, self.rope_scaling, self.head_dim)

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by; other than 1 under YaRN only."""
        scaling = self.rope_scaling
        if scaling["rope_type"] != "yarn":
            return 1.0
        if scaling.get("attention_factor") is not None:
            return float(scaling["attention_factor"])
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and all_dim:
            return _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], all_dim)
        return _mscale(scaling["factor"], 1.0)


class Source(TensorFolder):
    """A checkpoint that can be converted.

    Raises (on opening):
        ConfigError: of another architecture, or with something that is not supported.
        CheckpointError: an MLA model already, weights that are not whole, or tensors that the
            model does not use.
    """

    def __init__(self, path: Path | str) -> None:
        folder = Path(path)
        self.raw_config = read_json_object(folder / "config.json")
        origin = str(folder / "config.json")
        quantization = read_quantization(self.raw_config.get("quantization_config"), origin)
        refuse_quantized(quantization, folder)
        self.config = read_source_config(self.raw_config, origin)
        super().__init__(folder, quantization)
        shapes = source_shapes(self.config)
        self.check(shapes)
        unused_tensors(self, shapes, self.config)
        self.dtype = _DTYPES[self.info("model.embed_tokens.weight").dtype]
        """Of what is written anew: the embedding's."""

    def plain(self, name: str) -> torch.Tensor:
        """A tensor as it is written again: as it is, or in `dtype` where it is in float8."""
        tensor = self.read(name)
        return tensor.to(self.dtype) if name in self.scales else tensor.clone()

    @property
    def plain_bytes(self) -> int:
        """Of all tensors, as `plain` gives them."""
        return sum(
            math.prod(info.shape) * self.dtype.itemsize if name in self.scales else info.bytes
            for name, info in self.tensors.items()
        )


def read_source_config(raw: Mapping[str, Any], origin: str) -> SourceConfig:
    """Read and check a config.json.

    Raises:
        CheckpointError: the model is MLA already.
        ConfigError: another architecture, or values or keys that are not supported.
    """
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in families():
        raise CheckpointError(
            f"{origin}: this model has latent attention already",
            found=kind,
            allowed=", ".join(CONVERTIBLE),
            hint="quantize it as it is",
        )
    if kind not in CONVERTIBLE:
        raise ConfigError(
            f"{origin}: a model of this type cannot be converted",
            found=kind,
            allowed=", ".join(CONVERTIBLE),
        )
    keys = ConfigReader(raw, origin)
    for name in (*_NEUTRAL, "quantization_config"):
        keys.get(name)
    keys.expect("hidden_act", "silu")
    keys.expect("mlp_bias", False, None)
    keys.expect("rope_interleaved", False, None)
    keys.expect("partial_rotary_factor", 1.0, None)
    layers = keys.integer("num_hidden_layers")
    _refuse_windows(keys, str(kind), layers)
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    groups = keys.optional_integer("num_key_value_heads") or heads
    head_dim = keys.optional_integer("head_dim") or hidden // heads
    if heads % groups or head_dim % 2:
        raise ConfigError(
            f"{origin}: the heads do not fit together",
            found=f"{heads} query heads, {groups} key heads, head_dim {head_dim}",
            allowed="query heads a multiple of the key heads, an even head_dim",
        )
    has_bias = bool(keys.get("attention_bias"))
    theta, scaling = _read_rope(keys, 2e6 if kind == "smollm3" else 1e4)
    config = SourceConfig(
        model_type=str(kind),
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", kind == "smollm3"),
        query_bias=has_bias or kind == "qwen2",
        output_bias=has_bias and kind in ("llama", "qwen3", "smollm3"),
        qk_norm=kind == "qwen3",
        rope_theta=theta,
        rope_scaling=scaling,
        layers_without_rope=_layers_without_rope(keys, str(kind), layers),
        bos_token_id=keys.token_id("bos_token_id"),
        eos_token_ids=keys.token_ids("eos_token_id"),
    )
    keys.finish()
    return config


def layer_shapes(config: SourceConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer, by their names without the layer's prefix."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (config.attention_width, hidden),
        "self_attn.k_proj.weight": (config.key_width, hidden),
        "self_attn.v_proj.weight": (config.key_width, hidden),
        "self_attn.o_proj.weight": (hidden, config.attention_width),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.query_bias:
        shapes["self_attn.q_proj.bias"] = (config.attention_width,)
        shapes |= dict.fromkeys(
            ("self_attn.k_proj.bias", "self_attn.v_proj.bias"), (config.key_width,)
        )
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (d,))
    return shapes


def source_shapes(config: SourceConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of the checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in layer_shapes(config, layer).items()}
    return shapes


def inverse_frequencies(theta: float, scaling: Mapping[str, Any], dim: int) -> torch.Tensor:
    """Radians a position of each pair, as transformers computes them. Shapes: to [dim / 2]."""
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind = scaling["rope_type"]
    if kind == "linear":
        return inv_freq / scaling["factor"]
    if kind == "llama3":
        return _llama3(inv_freq, scaling)
    if kind == "yarn":
        return _yarn(inv_freq, scaling, theta, dim)
    return inv_freq


def _llama3(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between are blended (Llama 3.1)."""
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = context * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * kept + inv_freq / scaling["factor"] * (1 - kept)


def _yarn(
    inv_freq: torch.Tensor, scaling: Mapping[str, Any], theta: float, dim: int
) -> torch.Tensor:
    """YaRN (Peng et al., 2023), section 3.2: kept above `beta_fast` turns, stretched below
    `beta_slow`."""

    def pair_with(turns: float) -> float:
        context = scaling["original_max_position_embeddings"]
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with(scaling.get("beta_fast") or 32)
    high = pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / scaling["factor"] * ramp + inv_freq * (1 - ramp)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_rope(keys: ConfigReader, default_theta: float) -> tuple[float, dict[str, Any]]:
    """Theta, and the scaling with its kind."""
    kind, theta, nested = read_rope_kind(keys, ROPE_KEYS, default_theta)
    required = {"linear": ROPE_KEYS["linear"], "llama3": _LLAMA3, "yarn": _YARN[:2]}.get(kind, [])
    scaling: dict[str, Any] = {"rope_type": kind}
    for key in ROPE_KEYS[kind]:
        if key in required:
            scaling[key] = nested.positive(key)
        elif nested.get(key) is not None:
            scaling[key] = nested.flag(key) if key == "truncate" else nested.number(key)
    nested.finish()
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ConfigError(
            f"{nested.origin}: the factors of the frequencies are the wrong way round",
            found=f"low {scaling['low_freq_factor']}, high {scaling['high_freq_factor']}",
            allowed="low_freq_factor below high_freq_factor",
        )
    return theta, scaling


def _layers_without_rope(keys: ConfigReader, kind: str, layers: int) -> frozenset[int]:
    """SmolLM3 leaves the positions out of some layers; 1 in its list means with positions."""
    if kind != "smollm3":
        return frozenset()
    flags = keys.get("no_rope_layers")
    interval = max(1, keys.integer("no_rope_layer_interval", 4))
    if flags is None:
        flags = [(layer + 1) % interval for layer in range(layers)]
    if not isinstance(flags, list) or len(flags) != layers:
        raise ConfigError(
            f"{keys.origin}: no_rope_layers does not say it for every layer",
            found=flags,
            allowed=f"{layers} numbers, 0 or 1",
        )
    return frozenset(layer for layer, flag in enumerate(flags) if not flag)


def _refuse_windows(keys: ConfigReader, kind: str, layers: int) -> None:
    """Refuse layers that see a window of the text only, by their numbers."""
    window = keys.optional_integer("sliding_window")
    types = keys.get("layer_types")
    is_used = keys.get("use_sliding_window")
    if types is not None and not isinstance(types, list):
        raise ConfigError(
            f"{keys.origin}: layer_types has the wrong type", found=types, allowed="a list, or null"
        )
    if types is not None:
        limited = [i for i, one in enumerate(types) if one != "full_attention"]
    elif window is None or (kind != "mistral" and not is_used):
        limited = []
    elif kind == "mistral":
        limited = list(range(layers)) if window < keys.integer("max_position_embeddings") else []
    else:
        limited = list(range(keys.integer("max_window_layers", 0), layers))
    if limited:
        raise ConfigError(
            f"{keys.origin}: layers with a sliding window cannot be converted",
            found=f"window {window} in the layers {', '.join(map(str, limited))}",
            allowed="attention to the whole text in every layer",
            hint="with sliding_window null and max_position_embeddings of the window the model "
            "computes the same, up to that length",
        )
