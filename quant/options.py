"""What a user can choose about quantisation, and the recipe that follows for a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from mla_deploy.cache import cache_record, formats_of_layers
from mla_deploy.config import MlaConfig
from mla_deploy.errors import UsageError
from mla_deploy.model import build
from mla_deploy.modules.decoder import Decoder
from mla_deploy.modules.linear import Embedding, Linear
from mla_deploy.modules.mlp import Experts
from mla_deploy.packing import CODES
from mla_deploy.quant.cache_choice import CacheChoices, auto_formats, check_budget
from mla_deploy.quant.calibrate import AUTO
from mla_deploy.quant.fold import hadamard_block
from mla_deploy.quant.weights import check_group
from mla_deploy.recipe import LayerRecipe, Recipe, WeightFormat

Weights = Literal["int4", "int8", "none"]
EmbeddingFormat = Literal["fp16", "int8", "int4", "none"]
Zeros = Literal["integer", "exact"]
Kind = Literal["linear", "experts", "embedding", "lm_head"]

_BITS = {"int4": 4, "int8": 8, AUTO: 4}
"""Before a calibration has run, the smallest format stands for what it may choose."""
_ROTATED_CACHES = frozenset({"int8", "int4", "int4-g32", "int3", "int2"})
"""Formats that gain from a rotated latent; docs/quantization-study.md has the figures."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantise; None stands for a default that depends on the rest or on the model."""

    kv: str = "int4"
    """The cache record: a name of `mla_deploy.cache.cache_formats()`, or `auto`: each layer's own,
    by calibration and budget."""
    kv_first: str | None = None
    """The record of the first layer's cache. Default: `int8` where `kv` is `int4` or `int4-g32` and
    the model has more than one layer, else as `kv`, whose own name gives every layer the same."""
    kv_budget: float | None = None
    """Bytes of cache a token and layer, on average; for `auto`."""
    calibration: tuple[str, ...] = ()
    """Text files to calibrate with. Without any, the result depends on the weights alone."""
    weights: Weights | Literal["auto"] = "int4"
    """Matrices of attention, dense feed-forward and shared experts. `none`: as stored; `auto`: int4
    or int8 for each layer, by calibration and budget."""
    weights_budget: float | None = None
    """Bits a weight on average, scales and zeros included; for `auto`."""
    group: int | None = None
    """Neighbours that share a scale. Default: 64, or 32 for a kind that has a matrix whose inputs
    64 does not divide."""
    zeros: Zeros = "integer"
    """`exact` keeps HQQ's real zeros: less error, a slower product."""
    experts: Weights | None = None
    """Routed experts. Default: as `weights`."""
    embedding: EmbeddingFormat | None = None
    """The input table. Default: `fp16`, or `none` where weights are `none`."""
    lm_head: Weights | None = None
    """The output matrix. Default: `int8`, or `none` where weights are `none`."""
    feedback: bool = False
    """Pass the rounding error of each column of a matrix on to those that follow; needs a
    calibration. Not for experts and the input table."""
    rotate: bool | None = None
    """Rotate the latent. Default: as the calibration says, or without one where the cache is
    quantised to whole numbers."""

    def __post_init__(self) -> None:
        self._check_budget("--kv", self.kv, self.kv_budget, "cache formats", "360")
        if self.kv == AUTO and self.kv_first is not None:
            raise UsageError(
                "the first layer's cache is chosen like that of the others",
                found=f"--kv auto --kv-first {self.kv_first}",
                hint="leave one of them out",
            )
        self._check_budget("--weights", self.weights, self.weights_budget, "weight formats", "5")
        if self.feedback and not self.calibration:
            raise UsageError(
                "error feedback needs the inputs of the matrices, from a calibration",
                found="--feedback without --calibration",
                hint="give --calibration TEXT",
            )
        if self.feedback and self.weights == "none" and self.chosen("lm_head") == "none":
            raise UsageError(
                "error feedback is for matrices that are quantised",
                found="--feedback with --weights none",
                hint="leave one of them out",
            )
        allowed: dict[str, tuple[object, ...]] = {
            "weights": (*get_args(Weights), AUTO),
            "group": (None, 32, 64, 128),
            "zeros": get_args(Zeros),
            "experts": (None, *get_args(Weights)),
            "embedding": (None, *get_args(EmbeddingFormat)),
            "lm_head": (None, *get_args(Weights)),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UsageError(
                    f"{name} has a value that is not known",
                    found=getattr(self, name),
                    allowed=", ".join(str(one) for one in values if one is not None),
                )

        self._check_grid()

    def _check_grid(self) -> None:
        """Raise a UsageError for options of quantised matrices where there are none."""
        kinds: tuple[Kind, ...] = get_args(Kind)
        values = (("--group", self.group, None), ("--zeros", self.zeros, "integer"))
        found = [f"{name} {value}" for name, value, default in values if value != default]
        if found and not any(self.chosen(kind) in _BITS for kind in kinds):
            raise UsageError(
                "no matrix is quantised, so that scales and zeros have nothing to do",
                found=f"--weights {self.weights} {' '.join(found)}",
                hint=f"leave {' and '.join(found)} out, or quantise: --weights int4",
            )

    def _check_budget(
        self, option: str, value: str, budget: float | None, what: str, example: str
    ) -> None:
        """Raise a UsageError unless there is a budget exactly where one is needed."""
        if budget is not None and value != AUTO:
            raise UsageError(
                f"a budget is for {option} auto; another format takes what it takes",
                found=f"{option} {value} {option}-budget {budget:g}",
                hint="leave one of them out",
            )
        if value == AUTO and not (self.calibration and budget is not None):
            raise UsageError(
                f"the {what} of layers are chosen by a calibration under a budget",
                found=f"{option} auto {'with' if self.calibration else 'without'} --calibration, "
                f"{'without' if budget is None else 'with'} {option}-budget",
                allowed="both",
                hint=f"for instance: {option} auto {option}-budget {example} --calibration TEXT",
            )
        if budget is not None and not 0 < budget < math.inf:
            raise UsageError(
                "a budget is out of range",
                found=f"{option}-budget {budget:g}",
                allowed="a number above 0",
            )

    @property
    def allocated(self) -> tuple[Kind, ...]:
        """The kinds of matrices whose format is chosen for each layer."""
        kinds: tuple[Kind, ...] = ("linear", "experts")
        return tuple(kind for kind in kinds if self.chosen(kind) == AUTO)

    def chosen(self, kind: Kind) -> str:
        """The format of one kind of matrix, defaults filled in."""
        is_float = self.weights == "none"
        return {
            "linear": self.weights,
            "experts": self.experts or self.weights,
            "embedding": self.embedding or ("none" if is_float else "fp16"),
            "lm_head": self.lm_head or ("none" if is_float else "int8"),
        }[kind]


def recipe_for(
    config: MlaConfig, options: QuantizeOptions, choices: CacheChoices | None = None
) -> Recipe:
    """The recipe that the options mean for this model.

    Args:
        choices: what the calibration gave for the cache. Before it has run, the recipe of what may
            come stands for it: the smallest format, and a rotation.

    Raises:
        UsageError: a group that does not divide the inputs of a matrix, or a budget too small.
        ConfigError: an unknown cache format, or one that cannot hold this latent.
    """
    kv = options.kv
    if kv == AUTO:
        kv = auto_formats(config)[0]
        check_budget(config, options.kv_budget or 0.0)
    cache = formats_of_layers(config.num_hidden_layers, kv, options.kv_first)
    for name in dict.fromkeys((kv, *cache)):
        cache_record(name).parts(config.kv_lora_rank, config.qk_rope_head_dim)
    is_half = options.chosen("embedding") != "none"
    rotations = [_rotation(config, options, name) for name in cache]
    rotation = _rotation(config, options, kv)
    recipe = Recipe(
        cache_format=kv,
        gamma_folded=is_half or any(block is not None for block in rotations),
        latent_rotation=rotation,
        balanced=rotation is not None,
        half_precision=is_half,
    )
    columns: dict[Kind, dict[str, int]] = {}
    for matrix in matrices(build(replace(config, recipe=recipe))):
        columns.setdefault(matrix.kind, {})[matrix.name] = matrix.columns
    formats = {kind: _weight_format(options, kind, inputs) for kind, inputs in columns.items()}
    recipe = replace(
        recipe,
        linear=formats.get("linear"),
        experts=formats.get("experts"),
        embedding=formats.get("embedding"),
        lm_head=formats.get("lm_head"),
    )
    if choices is None:
        return _with_layers(
            recipe,
            [
                (name, block, block is not None)
                for name, block in zip(cache, rotations, strict=True)
            ],
        )
    calibrated = [
        (
            choice.format,
            None if rotation is None else rotation.block,
            rotation is not None and rotation.axes is not None,
        )
        for choice, rotation in zip(choices.chosen, choices.rotations, strict=True)
    ]
    return _with_layers(replace(recipe, gamma_folded=True), calibrated)


def _with_layers(recipe: Recipe, caches: Iterable[tuple[str, int | None, bool]]) -> Recipe:
    """The recipe with each layer's cache: record, rotation, whether it is balanced. Layers that are
    all alike are not listed."""
    layers = tuple(LayerRecipe(*cache, recipe.linear, recipe.experts) for cache in caches)
    full = replace(recipe, layers=layers)
    return full if len(set(layers)) > 1 else full.of_layer(0)


class Matrix(NamedTuple):
    """A matrix of the kinds that can be quantised."""

    kind: Kind
    name: str
    """In the checkpoint, without `.weight`."""
    columns: int
    weight_format: WeightFormat | None


def matrices(model: Decoder) -> Iterator[Matrix]:
    """Every matrix of a model that could be quantised, each once."""
    for module in model.modules():
        if not isinstance(module, (Linear, Embedding, Experts)):
            continue
        kind: Kind = "linear"
        if module is model.epilogue.lm_head:
            kind = "lm_head"
        elif isinstance(module, (Embedding, Experts)):
            kind = "embedding" if isinstance(module, Embedding) else "experts"
        weight_format = module.weight_format
        leaf = "weight" if weight_format is None else CODES
        values_per_column = 1 if weight_format is None else 8 // weight_format.bits
        for source in module.sources.values():
            for name, shape in source.tensors().items():
                base, _, suffix = name.rpartition(".")
                if suffix == leaf:
                    yield Matrix(kind, base, shape[-1] * values_per_column, weight_format)


def _rotation(config: MlaConfig, options: QuantizeOptions, cache_format: str) -> int | None:
    """The Hadamard blocks of a layer whose cache is that record."""
    block = hadamard_block(config.kv_lora_rank)
    if options.rotate is None:
        is_whole = cache_format in _ROTATED_CACHES
        return block if is_whole and block > 1 else None
    if options.rotate and block == 1:
        raise UsageError(
            "the latent cannot be rotated",
            found=f"kv_lora_rank {config.kv_lora_rank}",
            allowed="an even rank",
            hint="leave --rotate out",
        )
    return block if options.rotate else None


def _weight_format(
    options: QuantizeOptions, kind: Kind, inputs: dict[str, int]
) -> WeightFormat | None:
    bits = _BITS.get(options.chosen(kind))
    if bits is None:
        return None
    group = options.group
    if group is None:
        group = 64 if all(columns % 64 == 0 for columns in inputs.values()) else 32
    for name, columns in inputs.items():
        check_group(group, columns, name)
    return WeightFormat(bits, group, options.zeros)
