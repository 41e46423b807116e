"""`mla-deploy quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, force_option, output_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.quant.allocate import Point
    from mla_deploy.quant.cache_choice import CacheChoices
    from mla_deploy.quant.quantize import QuantizeReport
    from mla_deploy.quant.weight_choice import WeightChoices

KINDS = {
    "linear": "matrices",
    "experts": "routed experts",
    "embedding": "embedding",
    "lm_head": "lm_head",
    "other": "norms and others",
}


@click.command()
@click.argument("model", type=PATH)
@output_option
@click.option(
    "--kv",
    default="int4",
    show_default=True,
    help="Cache: int4, int4-g32, int3, int2, int8, fp8, fp16, fp32, one installed, or auto: each "
    "layer's own, by --calibration and --kv-budget.",
)
@click.option(
    "--kv-first",
    help="Cache of the first layer. Default: int8 where --kv is int4 or int4-g32, else as --kv, "
    "whose own name gives every layer the same.",
)
@click.option(
    "--kv-budget", type=float, help="With --kv auto: bytes a token and layer, on average."
)
@click.option(
    "--calibration",
    type=PATH,
    multiple=True,
    help="UTF-8 text to calibrate with; may be given again. Holds the model in memory.",
)
@click.option(
    "--weights",
    default="int4",
    show_default=True,
    help="Matrices: int4, int8, none (as they are), or auto: int4 or int8 for each layer, by "
    "--calibration and --weights-budget.",
)
@click.option(
    "--weights-budget",
    type=float,
    help="With --weights auto: bits a weight on average, scales and zeros included.",
)
@click.option(
    "--group",
    type=int,
    help="Neighbours that share a scale: 32, 64 or 128. Default: 64, or 32 where 64 does not fit.",
)
@click.option(
    "--zeros",
    default="integer",
    show_default=True,
    help="integer: whole zeros, fast; exact: HQQ's real zeros, a little better and slower.",
)
@click.option("--experts", help="Routed experts: int4, int8 or none. Default: as --weights.")
@click.option(
    "--embedding",
    help="Input table: fp16, int8, int4 or none. Default: fp16, or none where weights are none.",
)
@click.option(
    "--lm-head",
    help="Output matrix: int4, int8 or none. Default: int8, or none where weights are none.",
)
@click.option(
    "--feedback",
    is_flag=True,
    help="With --calibration: pass rounding errors on (GPTQ). Better int4 matrices, more time.",
)
@click.option(
    "--rotate/--no-rotate",
    default=None,
    help="Rotate the latent before it is cached. Default: as the calibration says, or else for "
    "caches of whole numbers.",
)
@force_option
@reporting
def command(
    reporter: Reporter,
    /,
    model: Path,
    output: Path,
    force: bool,
    calibration: tuple[Path, ...],
    **options: Any,
) -> None:
    """Make the checkpoint MODEL small: its weights, and the cache it will have.

    Writes a checkpoint that says how it was made. A run that was killed goes on where it stopped
    when it is repeated.
    """
    from mla_deploy.quant.options import QuantizeOptions
    from mla_deploy.quant.quantize import quantize_checkpoint

    texts = tuple(str(path.resolve()) for path in calibration)
    chosen = QuantizeOptions(**options, calibration=texts)
    with reporter.progress("quantizing") as progress:
        report = quantize_checkpoint(
            model, output, chosen, progress, say=reporter.note, force=force
        )
    values = {"model": str(model), "output": str(output), **report.to_json()}
    reporter.result(values, _text(output, report))


def _text(output: Path, report: QuantizeReport) -> str:
    from mla_deploy.inspection import described_formats

    rows = [
        (
            KINDS.get(name, name),
            f"{kind.tensors:,}",
            f"{kind.parameters:,}",
            f"{kind.source_bytes:,}",
            f"{kind.output_bytes:,}",
            "-" if kind.nmse is None else f"{kind.nmse:.2e}",
        )
        for name, kind in report.kinds.items()
    ]
    head = ("weights", "tensors", "parameters", "bytes before", "bytes after", "relative error")
    recipe = report.recipe
    layers = recipe.layers or (recipe,)
    rotations = {(layer.latent_rotation, layer.balanced) for layer in layers}
    ratio = report.source_bytes / max(1, report.output_bytes)
    entries = [
        ("output", str(output)),
        ("cache", described_formats([layer.cache_format for layer in layers])),
        (
            "weights",
            f"{table.size(report.source_bytes)} to {table.size(report.output_bytes)} "
            f"({ratio:.2f}x smaller)",
        ),
        ("time", f"{report.seconds:.1f} s"),
    ]
    block, balanced = rotations.pop()
    if block is not None and not rotations:
        axes = "balanced axes, then " if balanced else ""
        entries.insert(2, ("rotation", f"{axes}Hadamard blocks of {block}"))
    if report.resumed_bytes:
        entries.append(("resumed", f"{report.resumed_bytes:,} bytes were there already"))
    entries += [
        ("left out", f"{len(names)} tensors: {reason}") for reason, names in report.skipped.items()
    ]
    found = [table.table(head, rows), "", table.pairs(entries)]
    if report.cache is not None:
        found += ["", *_calibration(report.cache)]
    if report.weights is not None:
        found += ["", *_weight_bits(report.weights)]
    return "\n".join(found)


def _calibration(cache: CacheChoices) -> list[str]:
    """What each layer got and why, and how the allocations compare."""
    head = ("layer", "cache", "bytes", "rotation", "latent", "attention output", "KL alone")
    rows = [
        (
            str(layer),
            choice.format,
            str(choice.bytes),
            choice.rotation,
            f"{choice.sqnr_db[choice.rotation]:.1f} dB",
            f"{choice.output_error[choice.rotation]:.2%}",
            "-" if choice.kl is None else f"{choice.kl:.5f}",
        )
        for layer, choice in enumerate(cache.chosen)
    ]
    lines = [table.table(head, rows)]
    if cache.points:
        unit = "bytes a token and layer"
        lines += ["", _points(cache.points, unit)]
        taken = f"{cache.bytes_per_layer:.1f} of {cache.budget:g} {unit}"
        lines += ["", table.pairs([("budget", taken)])]
    return lines


def _weight_bits(weights: WeightChoices) -> list[str]:
    """The same of matrices."""
    head = ("layer", "matrices", "format", "bytes", "relative error", "KL alone")
    rows = [
        (
            str(item.layer),
            KINDS[item.kind],
            item.choice.format,
            f"{item.choice.bytes:,}",
            f"{item.choice.nmse:.2e}",
            f"{item.choice.kl:.5f}",
        )
        for item in weights.items
    ]
    taken = f"{weights.bits_per_weight:.3f} of {weights.budget:g} bits a weight"
    return [
        table.table(head, rows),
        "",
        _points(weights.points, "bits a weight"),
        "",
        table.pairs([("budget", taken)]),
    ]


def _points(points: Sequence[Point], unit: str) -> str:
    measured = sorted((one for one in points if one.is_measured), key=lambda one: one.size)
    rows = [(one.name, f"{one.size:.2f}", f"{one.kl:.5f}") for one in measured]
    return table.table(("all layers", unit, "KL"), rows)
