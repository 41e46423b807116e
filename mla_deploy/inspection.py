"""What a model is and what it costs, before anything is loaded: `inspect_model`.

Works on a config.json alone, on a checkpoint, and on a bundle; the last needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_deploy.bundle import MANIFEST, Bundle
from mla_deploy.errors import ConfigError, MlaError
from mla_deploy.manifest import PAGE_TOKENS, FileEntry, ModelInfo

if TYPE_CHECKING:
    from mla_deploy.config import MlaConfig, MoeConfig
    from mla_deploy.recipe import Recipe

    RecipeFor = Callable[[MlaConfig], Recipe]

FLOAT16 = "fp16"


@dataclass(frozen=True)
class CacheCost:
    """What one token costs in one cache format, scales and zeros included."""

    format: str
    """A record's name; joined by `+` where layers differ."""
    bytes_per_token_per_layer: float | None
    """None: the format cannot hold a latent of this size. The mean where layers differ."""
    bytes_per_token: int | None
    layers: tuple[str, ...] = ()
    """The record of each layer, where they differ."""


@dataclass(frozen=True)
class WeightCost:
    """What the weights cost in one format."""

    format: str
    bytes: int | None
    """None: the model cannot have this format."""
    reason: str | None = None


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect_model`."""

    path: Path
    kind: str
    """`config`, `checkpoint` or `bundle`."""
    model: ModelInfo
    caches: tuple[CacheCost, ...]
    weights: tuple[WeightCost, ...]
    recipe: Mapping[str, Any]
    moe: MoeConfig | None = None
    """Not known for a bundle."""
    files: tuple[FileEntry, ...] = ()
    """Of a bundle."""
    stored_as: str | None = None
    """The cache format of a quantised checkpoint or a bundle, as in `caches`."""
    cache_layers: tuple[str, ...] = ()
    """The same for each layer."""
    verified: bool = False
    source_quantization: str | None = None
    """The method by which another tool quantised the weights."""

    @property
    def mha_bytes_per_token_per_layer(self) -> int:
        """What plain attention would cache in float16: a key and a value for each head."""
        model = self.model
        width = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
        return 2 * model.num_attention_heads * width

    def times_smaller(self, cache: CacheCost) -> float | None:
        """How often the cache fits into the one of plain attention."""
        each = cache.bytes_per_token_per_layer
        return None if each is None else self.mha_bytes_per_token_per_layer / each

    def contexts(self, memory_bytes: int) -> dict[str, dict[str, int]]:
        """The tokens of context that fit into so much memory, by cache and by weight format."""
        return {
            cache.format: {
                weights.format: context_that_fits(
                    memory_bytes, weights.bytes, cache.bytes_per_token
                )
                for weights in self.weights
                if weights.bytes is not None
            }
            for cache in self.caches
            if cache.bytes_per_token is not None
        }


def inspect_model(
    path: Path | str,
    recipes: Callable[[], Mapping[str, RecipeFor]] = dict,
    *,
    verify: bool = False,
) -> Inspection:
    """Look at a checkpoint's folder, a config.json, or a bundle.

    Args:
        path: one of the three.
        recipes: weight formats whose bytes are wanted, by name: the recipe each means for a model.
            Not asked for a bundle.
        verify: hash all files of a bundle, however large; compare the tensors of a checkpoint with
            what the config asks for.

    Raises:
        ConfigError: the config cannot be used.
        CheckpointError: the weights are not whole (only looked at with `verify`).
        BundleError: the bundle is not whole.
    """
    source = Path(path)
    if source.name == MANIFEST and source.is_file():
        source = source.parent
    if (source / MANIFEST).exists():
        return _inspect_bundle(source, verify)
    return _inspect_config(source, recipes(), verify)


def context_that_fits(memory_bytes: int, weight_bytes: int, kv_bytes_per_token: int) -> int:
    """Tokens whose cache fits beside the weights, in whole pages; 0 if not even the weights do."""
    tokens = (memory_bytes - weight_bytes) // kv_bytes_per_token
    return max(0, tokens // PAGE_TOKENS * PAGE_TOKENS)


def stored_bytes(config: MlaConfig, recipe: Recipe) -> int:
    """Bytes of all parameters of a model that was quantised by that recipe."""
    from dataclasses import replace

    from mla_deploy.model import build

    model = build(replace(config, recipe=recipe))
    return sum(parameter.nbytes for parameter in model.parameters())


def _inspect_config(source: Path, recipes: Mapping[str, RecipeFor], verify: bool) -> Inspection:
    from mla_deploy.cache import cache_formats, formats_of_layers
    from mla_deploy.checkpoint import Checkpoint
    from mla_deploy.families import load_config
    from mla_deploy.model import check_weights, model_info, unquantized

    config = load_config(source)
    if verify:
        folder = source if source.is_dir() else source.parent
        check_weights(Checkpoint(folder))
    model = model_info(config)
    caches = []
    for name in cache_formats():
        try:
            caches.append(_cache_cost(config, (name,) * config.num_hidden_layers))
        except ConfigError:
            caches.append(CacheCost(name, None, None))
    recipe = config.recipe
    formats = recipe.cache_formats(config.num_hidden_layers)
    quantization = config.source_quantization
    is_quantised = recipe != unquantized(config).recipe
    made = [formats_of_layers(config.num_hidden_layers, name) for name in cache_formats()]
    for layers in [formats] if is_quantised else made:
        if len(set(layers)) > 1:
            with suppress(ConfigError):  # the record's own row says that it does not fit
                caches.append(_cache_cost(config, layers))
    weights = [WeightCost("as stored", stored_bytes(config, recipe))] if is_quantised else []
    for name, recipe_for in recipes.items():
        try:
            weights.append(WeightCost(name, stored_bytes(config, recipe_for(unquantized(config)))))
        except MlaError as error:  # a matrix that the groups do not divide
            weights.append(WeightCost(name, None, error.what))
    weights.append(WeightCost(FLOAT16, 2 * model.parameters))
    return Inspection(
        path=source,
        kind="checkpoint" if source.is_dir() else "config",
        model=model,
        caches=tuple(sorted(caches, key=lambda cost: cost.bytes_per_token or 0)),
        weights=tuple(weights),
        recipe=recipe.to_json(),
        moe=config.moe,
        stored_as=joined_formats(formats) if is_quantised else None,
        cache_layers=formats if is_quantised else (),
        verified=verify,
        source_quantization=None if quantization is None else quantization.method,
    )


def _cache_cost(config: MlaConfig, layers: tuple[str, ...]) -> CacheCost:
    """Raises a ConfigError where a record cannot hold the latent."""
    from mla_deploy.cache import cache_record

    sizes = config.kv_lora_rank, config.qk_rope_head_dim
    return _cost(layers, sum(cache_record(name).bytes_per_token(*sizes) for name in layers))


def _cost(layers: tuple[str, ...], total: int) -> CacheCost:
    each = total / len(layers)
    mean = int(each) if each.is_integer() else each
    return CacheCost(joined_formats(layers), mean, total, layers if len(set(layers)) > 1 else ())


def joined_formats(layers: Sequence[str]) -> str:
    """The name in `--json` of a cache whose layers have these records: `int4`, `int4+int8`."""
    return "+".join(sorted(set(layers)))


def described_formats(layers: Sequence[str]) -> str:
    """The same for people: `int4`, `int4 (first layer int8)`, `int2+int3+int8`."""
    first, *others = layers
    if len(set(others)) == 1 and first != others[0]:
        return f"{others[0]} (first layer {first})"
    return joined_formats(layers)


def _inspect_bundle(folder: Path, verify: bool) -> Inspection:
    bundle = Bundle.open(folder, verify=verify)
    manifest = bundle.manifest
    layers = tuple(layer.format for layer in manifest.cache.layers)
    graph = manifest.graph.path
    weights = sum(entry.bytes for entry in manifest.files if entry.path.startswith(graph))
    return Inspection(
        path=folder,
        kind="bundle",
        model=manifest.model,
        caches=(_cost(layers, bundle.kv_bytes_per_token),),
        weights=(WeightCost("bundle", weights),),
        recipe=manifest.recipe,
        files=tuple(manifest.files),
        stored_as=joined_formats(layers),
        cache_layers=layers,
        verified=verify,
    )
