"""The sizes of the result."""

from __future__ import annotations

from dataclasses import dataclass

from mla_deploy.errors import ConfigError, UsageError
from mla_deploy.quant.compress.methods import method_rope_step
from mla_deploy.quant.compress.options import ConvertOptions
from mla_deploy.quant.compress.source import SourceConfig

_SHARES = (0.125, 0.25, 0.375, 0.5)
"""Of the cache, tried for the rotary channels."""
_LARGEST_ROPE = 128
"""That is tried: the native kernels take no more."""


@dataclass(frozen=True)
class Geometry:
    """What a token caches in one layer."""

    kv_lora_rank: int
    qk_rope_head_dim: int

    @property
    def numbers(self) -> int:
        """Latent and rotary key together."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def ratio(self, config: SourceConfig) -> float:
        """Against the source's keys and values."""
        return self.numbers / config.cached_numbers

    @property
    def text(self) -> str:
        """For messages."""
        return f"kv_lora_rank {self.kv_lora_rank}, qk_rope_head_dim {self.qk_rope_head_dim}"


def candidates(config: SourceConfig, options: ConvertOptions) -> list[Geometry]:
    """The sizes that the options allow: one, or several to choose from by trial.

    Raises:
        UsageError: a size that the model or the method cannot have.
        ConfigError: a model that the layout cannot hold.
    """
    if options.layout == "deepseek_v3":
        _check_stock_layout(config)
    if options.kv_lora_rank is not None:
        assert options.qk_rope_head_dim is not None
        chosen = [Geometry(options.kv_lora_rank, options.qk_rope_head_dim)]
    else:
        chosen = _of_ratio(config, options)
    for one in chosen:
        _check(one, config, options)
    return chosen


def _of_ratio(config: SourceConfig, options: ConvertOptions) -> list[Geometry]:
    assert options.ratio is not None
    total = int(options.ratio * config.cached_numbers + 1e-9)
    step = method_rope_step(options.method, config.num_key_value_heads)
    rope_grain, rank_grain = _grains(total)
    if options.qk_rope_head_dim is not None:
        ropes = {options.qk_rope_head_dim}
    elif options.layout == "deepseek_v3":
        ropes = {config.head_dim >> shift for shift in range(3) if not config.head_dim >> shift & 1}
    elif step > 2:
        ropes = {step * max(1, config.head_dim // 16)}  # MHA2MLA keeps an eighth of a head
    else:
        wanted = (int(share * total) // rope_grain * rope_grain for share in _SHARES)
        ropes = {min(max(rope_grain, rope), _LARGEST_ROPE) for rope in wanted}
    fitting = []
    for rope in sorted(ropes):
        rank = (total - rope) // rank_grain * rank_grain
        if rope > config.key_width or rank <= 0:
            continue
        if options.qk_rope_head_dim is None and options.layout == "mla_deploy" and step == 2:
            # What rounding the rank has left over.
            room = (total - rank) // rope_grain * rope_grain
            rope = min(room, config.key_width, max(rope, _LARGEST_ROPE))
        fitting.append(Geometry(rank, rope))
    if not fitting:
        raise UsageError(
            "the cache is too small for this model and method",
            found=f"{total} numbers a token and layer, of which {min(ropes)} would be rotary",
            allowed=f"above {(min(ropes) + rank_grain) / config.cached_numbers:.4f} of the cache",
            hint="give a larger --target-ratio",
        )
    return list(dict.fromkeys(_cut(one, config) for one in fitting))


def _cut(geometry: Geometry, config: SourceConfig) -> Geometry:
    """No more rank than there is to hold."""
    most = config.cached_numbers - geometry.qk_rope_head_dim
    return Geometry(min(geometry.kv_lora_rank, most), geometry.qk_rope_head_dim)


def _grains(total: int) -> tuple[int, int]:
    """Multiples that the rotary channels and the rank are rounded down to, where the cache is large
    enough to leave a choice: what native kernels take, and groups of quantised caches divide."""
    if total >= 512:
        return 16, 64
    return (4, 16) if total >= 48 else (2, 1)


def _check(geometry: Geometry, config: SourceConfig, options: ConvertOptions) -> None:
    rope, rank = geometry.qk_rope_head_dim, geometry.kv_lora_rank
    step = method_rope_step(options.method, config.num_key_value_heads)
    if rope % step or rope > config.key_width:
        raise UsageError(
            "qk_rope_head_dim does not fit",
            found=rope,
            allowed=f"multiples of {step} up to {config.key_width}"
            + (", the same number for each key head" if step > 2 else ""),
        )
    if options.layout == "deepseek_v3" and config.head_dim % rope:
        raise UsageError(
            "qk_rope_head_dim does not fit the layout deepseek_v3, whose frequencies are those of "
            "one head",
            found=rope,
            allowed=f"{config.head_dim}, or what divides it",
        )
    most = config.cached_numbers - rope + (options.layout == "deepseek_v3")
    if rank > most:
        raise UsageError(
            "kv_lora_rank is above what a layer has",
            found=rank,
            allowed=f"1 to {most} beside {rope} rotary channels",
        )
    if options.layout == "deepseek_v3" and rank < 2:
        raise UsageError(
            "kv_lora_rank is too small for the layout deepseek_v3, which needs one number for "
            "itself",
            found=rank,
            allowed="2 or more",
        )


def _check_stock_layout(config: SourceConfig) -> None:
    lacking = {
        "norms on queries and keys": config.qk_norm,
        "biases on the queries": config.query_bias,
        "rope scaling": config.rope_scaling["rope_type"] != "default",
        "layers without rotary positions": bool(config.layers_without_rope),
    }
    if found := [name for name, is_there in lacking.items() if is_there]:
        raise ConfigError(
            "the layout deepseek_v3 has no place for what this model has",
            found=", ".join(found),
            allowed="the layout mla_deploy",
        )
