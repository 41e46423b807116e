"""`mla-deploy build`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, force_option, output_option, target_ratio_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.exporters.build import BuildReport
    from mla_deploy.quant.compress.report import ConversionReport
    from mla_deploy.quant.quantize import QuantizeReport


@click.command()
@click.argument("model", type=PATH)
@output_option
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="What it is to run on: cpu, cuda, or a GPU to build a TensorRT engine for, such as sm89.",
)
@click.option("--kv", help="Cache, as with quantize, without auto. Default: int4.")
@click.option("--weights", help="Matrices: int4, int8, or none (as they are). Default: int4.")
@click.option(
    "--calibration",
    multiple=True,
    metavar="TEXT",
    help="UTF-8 text file that each step measures on, any number of times; to convert also self: "
    "the model writes it.",
)
@target_ratio_option
@force_option
@reporting
def command(reporter: Reporter, /, model: Path, output: Path, force: bool, **options: Any) -> None:
    """Make a bundle of the checkpoint MODEL in one go: convert, quantize, export.

    MODEL is converted where its attention is not latent yet, which needs --target-ratio and
    --calibration; one that is quantised already is only exported. A run that was stopped goes on
    from the folder OUTPUT.partial when it is repeated. The three commands by themselves have more
    options.
    """
    from mla_deploy.exporters.build import build_bundle
    from mla_deploy.exporters.build_plan import BuildOptions

    with reporter.progress("building") as progress:
        report = build_bundle(
            model, output, BuildOptions(**options), progress, say=reporter.note, force=force
        )
    reporter.result({"model": str(model), **report.to_json()}, _text(report))


def _text(report: BuildReport) -> str:
    entries: list[tuple[str, str]] = []
    for name, state in report.steps.items():
        lines: list[str] = [state]
        if name == "convert" and report.conversion is not None:
            lines = _conversion(report.conversion)
        elif name == "quantize" and report.quantization is not None:
            lines = _quantization(report.quantization)
        elif name == "export":
            lines = [f"for {report.target}, {report.export.nodes:,} nodes"]
        entries += [(name, lines[0]), *(("", line) for line in lines[1:])]
    entries += [
        ("bundle", str(report.bundle)),
        ("size", f"{report.bytes:,} bytes ({table.size(report.bytes)})"),
        ("cache", f"{report.kv_bytes_per_token:,} bytes a token"),
        ("time", f"{report.seconds:.1f} s"),
        ("next", f'mla-deploy run {shlex.quote(str(report.bundle))} "Once upon a time"'),
    ]
    return table.pairs(entries)


def _conversion(report: ConversionReport) -> list[str]:
    lines = [f"{report.geometry.text} ({report.geometry.ratio(report.source):.2%} of the cache)"]
    if (found := report.held_out) is not None:
        lines.append(
            f"loss {found.loss:.4f} before, {found.converted_loss:.4f} after; KL divergence "
            f"{found.kl:.4f} nats a token, on {found.tokens:,} held-out tokens"
        )
    return lines


def _quantization(report: QuantizeReport) -> list[str]:
    from mla_deploy.inspection import described_formats

    layers = report.recipe.layers or (report.recipe,)
    ratio = report.source_bytes / max(1, report.output_bytes)
    return [
        f"weights {table.size(report.source_bytes)} to {table.size(report.output_bytes)} "
        f"({ratio:.2f}x smaller)",
        f"cache {described_formats([layer.cache_format for layer in layers])}",
        *(f"left out {len(names)} tensors: {why}" for why, names in report.skipped.items()),
    ]
