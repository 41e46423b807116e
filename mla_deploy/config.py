"""`MlaConfig`: what a model is, read from a Hugging Face config.json and checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from mla_deploy.block_scales import SourceQuantization, read_quantization
from mla_deploy.config_reader import LARGEST, ConfigReader
from mla_deploy.errors import ConfigError
from mla_deploy.recipe import RECIPE_KEY, Recipe
from mla_deploy.rope_config import RopeConfig, read_rope

_MOST_WIDTH, _MOST_EXPERTS = 1 << 20, 1 << 12
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": _MOST_WIDTH,
    "intermediate_size": _MOST_WIDTH,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 14,
    "kv_lora_rank": _MOST_WIDTH,
    "qk_nope_head_dim": _MOST_WIDTH,
    "qk_rope_head_dim": _MOST_WIDTH,
    "v_head_dim": _MOST_WIDTH,
    "max_position_embeddings": LARGEST,
}
"""What is far above every model that there is: a config.json is not trusted, and modules are made
by it before a weight is looked at."""


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
    source_quantization: SourceQuantization | None
    """Of weights that another tool quantised."""
    recipe: Recipe = field(default_factory=Recipe)
    has_latent_norm: bool = True
    """Whether c_kv is normalised before it is cached."""
    query_bias: bool = False
    """Whether `q_proj` has a bias too, where `attention_bias` gives the others one."""
    qk_norm_groups: int | None = None
    """Key heads of a model that normalises queries and keys by head before its rotary positions,
    as Qwen3 does; None: no such norms."""
    rope_interleave: bool = True
    """Whether rotary channels are stored as pairs of neighbours; False: all first ones of the
    pairs, then all second ones."""
    embedding_scale: float = 1.0
    """What embedded tokens are multiplied by."""
    logit_scale: float = 1.0
    """What logits are multiplied by."""

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            _check_range(self, name, 1, most)
        if self.q_lora_rank is not None:
            _check_range(self, "q_lora_rank", 1, _MOST_WIDTH)
        layers = len(self.recipe.layers)
        if layers not in (0, self.num_hidden_layers):
            raise ConfigError(
                "the recipe is of another model",
                found=f"{layers} layers",
                allowed=f"{self.num_hidden_layers}, or none that differ",
                hint="quantize the source model again",
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                "qk_rope_head_dim is odd", found=self.qk_rope_head_dim, allowed="an even number"
            )
        if self.moe is not None:
            _check_moe(self.moe)


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
    keys: ConfigReader,
    moe: MoeConfig | None,
    *,
    rms_norm_eps: float = 1e-6,
    v_head_dim: int | None = None,
    tie_word_embeddings: bool = False,
    rope_interleave: bool = True,
) -> MlaConfig:
    """The keys that the MLA families share.

    Args:
        rms_norm_eps, v_head_dim, tie_word_embeddings: the family's defaults.
        rope_interleave: how the family stores rotary channels.
    """
    heads = keys.integer("num_attention_heads")
    keys.expect("num_key_value_heads", heads, None)
    keys.expect("hidden_act", "silu")
    keys.expect("partial_rotary_factor", 1.0, None)  # of the rotary channels, which have a size
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
        v_head_dim=keys.integer("v_head_dim", v_head_dim),
        rms_norm_eps=keys.positive("rms_norm_eps", rms_norm_eps),
        latent_norm_eps=1e-6,
        max_position_embeddings=keys.integer("max_position_embeddings"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", tie_word_embeddings),
        attention_bias=keys.flag("attention_bias", False),
        rope=read_rope(keys),
        moe=moe,
        bos_token_id=keys.token_id("bos_token_id"),
        eos_token_ids=keys.token_ids("eos_token_id"),
        source_quantization=read_quantization(keys.get("quantization_config"), keys.origin),
        recipe=Recipe.from_json(keys.get(RECIPE_KEY), keys.origin),
        rope_interleave=rope_interleave,
    )


def _check_range(config: object, name: str, least: int, most: int) -> None:
    value = getattr(config, name)
    if not least <= value <= most:
        raise ConfigError(f"{name} is out of range", found=value, allowed=f"{least} to {most}")


def _check_moe(moe: MoeConfig) -> None:
    _check_range(moe, "moe_intermediate_size", 1, _MOST_WIDTH)
    for name in ("n_routed_experts", "num_experts_per_tok"):
        _check_range(moe, name, 1, _MOST_EXPERTS)
    for name in ("n_group", "topk_group", "moe_layer_freq"):
        _check_range(moe, name, 1, LARGEST)
    for name in ("n_shared_experts", "first_k_dense_replace"):
        _check_range(moe, name, 0, LARGEST)
    if moe.n_routed_experts % moe.n_group:
        raise ConfigError(
            "the experts do not divide into groups",
            found=f"{moe.n_routed_experts} experts, {moe.n_group} groups",
            allowed="n_routed_experts a multiple of n_group",
        )
    reachable = moe.n_routed_experts // moe.n_group * moe.topk_group
    if not 0 < moe.num_experts_per_tok <= reachable:
        raise ConfigError(
            "num_experts_per_tok does not fit the experts in topk_group groups",
            found=moe.num_experts_per_tok,
            allowed=f"1 to {reachable}",
        )
