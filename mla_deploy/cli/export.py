"""`mla-deploy export`."""

from __future__ import annotations

from pathlib import Path

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, force_option, output_option
from mla_deploy.cli.reporter import Reporter, reporting

TARGETS = ("onnx",)


@click.command()
@click.argument("model", type=PATH)
@output_option
@click.option("--to", "target", default="onnx", show_default=True, help="Format of the graph.")
@force_option
@reporting
def command(reporter: Reporter, model: Path, output: Path, target: str, force: bool) -> None:
    """Write a bundle: the graph of MODEL, its weights, its tokenizer and a manifest.

    MODEL is a checkpoint as it was downloaded, or one that `mla-deploy quantize` wrote.
    """
    from mla_deploy.errors import UsageError

    if target not in TARGETS:
        raise UsageError(
            "there is no export to this format",
            found=target,
            allowed=", ".join(TARGETS),
            hint="`--to onnx` runs on ONNX Runtime; TensorRT is planned",
        )
    from mla_deploy.exporters.onnx import export_onnx

    with reporter.progress("writing weights") as progress:
        report = export_onnx(model, output, force=force, progress=progress)
    entries = [
        ("bundle", str(report.bundle)),
        ("size", f"{report.bytes:,} bytes ({table.size(report.bytes)})"),
        ("graph", f"{report.nodes:,} nodes"),
        ("cache", f"{report.kv_bytes_per_token:,} bytes a token"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    values = {
        "bundle": str(report.bundle),
        "target": target,
        "bytes": report.bytes,
        "nodes": report.nodes,
        "kv_bytes_per_token": report.kv_bytes_per_token,
        "seconds": report.seconds,
    }
    reporter.result(values, table.pairs(entries))
