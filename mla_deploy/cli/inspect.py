"""`mla-deploy inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, MemorySize
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.inspection import CacheCost, Inspection, RecipeFor

_QUANTIZED = {
    "fp8": "The weights are in float8: `quantize`, `convert` and `eval` read them as they are.",
    "hqq": "The weights are quantised by hqq: `quantize` takes them over.",
}
_UNREADABLE = "The weights are quantised by another tool, which cannot be read."


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--memory", type=MemorySize(), help="Show what context fits into so much, such as 8GB."
)
@click.option(
    "--verify",
    is_flag=True,
    help="Hash every file of a bundle; check that a checkpoint's weights are complete.",
)
@reporting
def command(reporter: Reporter, model: Path, memory: int | None, verify: bool) -> None:
    """Show what a model is and what its cache and weights cost.

    MODEL is a checkpoint, a config.json alone, or a bundle.
    """
    from mla_deploy.inspection import inspect_model

    found = inspect_model(model, _weight_recipes, verify=verify)
    reporter.result(_values(found, memory), _text(found, memory))


def _weight_recipes() -> Mapping[str, RecipeFor]:
    from mla_deploy.cli.weights import WEIGHT_RECIPES

    return WEIGHT_RECIPES


def _values(found: Inspection, memory: int | None) -> dict[str, Any]:
    held = [cache for cache in found.caches if cache.bytes_per_token is not None]
    values: dict[str, Any] = {
        "path": str(found.path),
        "kind": found.kind,
        **found.model.model_dump(),
        "cache_format": found.stored_as,
        "recipe": found.recipe,
        "kv_bytes_per_token_per_layer": {c.format: c.bytes_per_token_per_layer for c in held},
        "kv_bytes_per_token": {c.format: c.bytes_per_token for c in held},
        "mha_fp16_bytes_per_token_per_layer": found.mha_bytes_per_token_per_layer,
        "times_smaller_than_mha_fp16": {c.format: found.times_smaller(c) for c in held},
        "weight_bytes": {weights.format: weights.bytes for weights in found.weights},
        "source_quantization": found.source_quantization,
        "files": [entry.model_dump() for entry in found.files],
        "verified": found.verified,
    }
    if memory is not None:
        values["memory_bytes"] = memory
        values["context_that_fits"] = found.contexts(memory)
    return values


def _text(found: Inspection, memory: int | None) -> str:
    parts = [f"{found.path} ({found.kind})", "", table.pairs(_geometry(found)), "", _caches(found)]
    parts += ["", _weights(found)]
    if memory is not None:
        parts += ["", _contexts(found, memory)]
    if found.files:
        rows = [(entry.path, table.count(entry.bytes)) for entry in found.files]
        state = "all hashed and whole" if found.verified else "sizes compared; --verify hashes all"
        parts += ["", f"Files ({state})", table.table(("file", "bytes"), rows)]
    elif found.verified:
        parts += ["", "The weights are complete and of the right shapes."]
    if found.source_quantization is not None:
        parts += ["", _QUANTIZED.get(found.source_quantization, _UNREADABLE)]
    return "\n".join(parts)


def _geometry(found: Inspection) -> list[tuple[str, str]]:
    from mla_deploy.inspection import described_formats

    model = found.model
    heads = f"{model.num_attention_heads} of nope {model.qk_nope_head_dim} + rope "
    heads += f"{model.qk_rope_head_dim}, value {model.v_head_dim}"
    total = f"{table.count(model.parameters)} ({table.parameters(model.parameters)})"
    entries = [
        ("model_type", model.model_type),
        ("parameters", total),
        ("layers", f"{model.num_hidden_layers} of hidden size {model.hidden_size}"),
        ("heads", heads),
        ("kv_lora_rank", str(model.kv_lora_rank)),
        ("q_lora_rank", "none" if model.q_lora_rank is None else str(model.q_lora_rank)),
    ]
    if (moe := found.moe) is not None:
        shared = f" + {moe.n_shared_experts} shared" if moe.n_shared_experts else ""
        experts = f"{moe.num_experts_per_tok} of {moe.n_routed_experts}{shared}, "
        entries.append(("experts", experts + f"from layer {moe.first_k_dense_replace} on"))
    entries += [
        ("vocabulary", table.count(model.vocab_size)),
        ("context", f"{table.count(model.max_position_embeddings)} tokens"),
    ]
    if found.stored_as is not None:
        entries.append(("cache", described_formats(found.cache_layers)))
    return entries


def _caches(found: Inspection) -> str:
    layers = found.model.num_hidden_layers
    plain = found.mha_bytes_per_token_per_layer
    rows = [("plain attention, fp16", table.count(plain), table.count(plain * layers), "1.0x")]
    for cache in reversed(found.caches):
        each, total, times = (
            cache.bytes_per_token_per_layer, cache.bytes_per_token, found.times_smaller(cache)
        )  # fmt: skip
        if each is None or total is None or times is None:
            rows.append((cache.format, "does not fit this latent", "", ""))
        else:
            mean = f"{each:,}" if isinstance(each, int) else f"{each:,.1f}"
            rows.append((f"latent, {_name(cache)}", mean, table.count(total), f"{times:.1f}x"))
    head = ("bytes of cache", "per token and layer", "per token", "smaller")
    return table.table(head, rows)


def _name(cache: CacheCost) -> str:
    from mla_deploy.inspection import described_formats

    return described_formats(cache.layers or (cache.format,))


def _weights(found: Inspection) -> str:
    rows = [
        (one.format, str(one.reason), "")
        if one.bytes is None
        else (one.format, table.count(one.bytes), table.size(one.bytes))
        for one in found.weights
    ]
    return table.table(("weights", "bytes", ""), rows)


def _contexts(found: Inspection, memory: int) -> str:
    limit = found.model.max_position_embeddings
    contexts = found.contexts(memory)
    names = {cache.format: _name(cache) for cache in found.caches}
    rows = []
    for cache, by_weights in contexts.items():
        cells = [
            "-" if not tokens else f"{tokens:,}" + (" *" if tokens >= limit else "")
            for tokens in by_weights.values()
        ]
        rows.append((names[cache], *cells))
    head = ("cache \\ weights", *next(iter(contexts.values()), ()))
    return "\n".join(
        [
            f"Tokens of context that fit into {table.size(memory)} beside the weights "
            "(weights and cache alone; leave room for the program)",
            table.table(head, rows),
            f"  -  the weights alone do not fit    *  the model's limit of {limit:,} or more",
        ]
    )
