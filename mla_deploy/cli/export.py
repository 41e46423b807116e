"""`mla-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, force_option, output_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.exporters.onnx.export import ExportReport
    from mla_deploy.exporters.tensorrt.export import TensorRtReport

FORMATS = ("onnx", "tensorrt")


@click.command()
@click.argument("model", type=PATH)
@output_option
@click.option(
    "--to", "to", default="onnx", show_default=True, help="Format of the graph: onnx, tensorrt."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="What it is to run on. ONNX: cpu (default) or cuda. TensorRT: a GPU to build an engine "
    "for, such as sm89; may be given several times.",
)
@click.option("--compat", help="TensorRT: the version, rtx1.7 (default), trt11, trt10.15, trt10.3.")
@click.option("--dtype", help="TensorRT: type of activations, fp16 (default), bf16, fp32.")
@click.option(
    "--plugin", is_flag=True, help="TensorRT: keep latent attention as one node, for the plugin."
)
@click.option("--onnx-only", is_flag=True, help="TensorRT: write the graph, build no engine.")
@click.option("--max-tokens", type=int, help="TensorRT: longest context. Default: 8192.")
@click.option("--prefill-chunk", type=int, help="TensorRT: most new tokens a step. Default: 256.")
@click.option("--timeout", type=float, help="TensorRT: seconds an engine. Default: 3600.")
@force_option
@reporting
def command(
    reporter: Reporter,
    model: Path,
    output: Path,
    to: str,
    targets: tuple[str, ...],
    compat: str | None,
    dtype: str | None,
    plugin: bool,
    onnx_only: bool,
    max_tokens: int | None,
    prefill_chunk: int | None,
    timeout: float | None,
    force: bool,
) -> None:
    """Write a bundle: the graph of MODEL, its weights, its tokenizer and a manifest.

    MODEL is a checkpoint as it was downloaded, or one that `mla-deploy quantize` wrote. With
    `--target cuda` the graph computes in float16, for ONNX Runtime's CUDA provider. With
    `--to tensorrt` the bundle holds an engine a GPU; MODEL may also be a bundle that was made with
    `--onnx-only`.
    """
    from mla_deploy.errors import UsageError

    if to not in FORMATS:
        raise UsageError(
            "there is no export to this format",
            found=to,
            allowed=", ".join(FORMATS),
            hint="`--to onnx` runs on ONNX Runtime",
        )
    choices: dict[str, Any] = {
        "compat": compat,
        "dtype": dtype,
        "plugin": plugin or None,
        "onnx_only": onnx_only or None,
        "max_tokens": max_tokens,
        "prefill_chunk": prefill_chunk,
        "timeout": timeout,
    }
    given = {name: value for name, value in choices.items() if value is not None}
    report: ExportReport | TensorRtReport
    if to == "onnx":
        if given:
            raise UsageError(
                "an option of TensorRT without it",
                found="--" + next(iter(given)).replace("_", "-"),
                hint="add `--to tensorrt`",
            )
        if len(targets) > 1:
            raise UsageError(
                "a bundle for ONNX Runtime has one target",
                found=", ".join(targets),
                hint="export once for each",
            )
        from mla_deploy.exporters.onnx import export_onnx

        with reporter.progress("writing weights") as progress:
            report = export_onnx(
                model, output, target=(*targets, "cpu")[0], force=force, progress=progress
            )
        engines: list[dict[str, Any]] = []
    else:
        from mla_deploy.exporters.tensorrt.export import TensorRtOptions, export_tensorrt
        from mla_deploy.runtime.tensorrt_plugin import plugin_library

        options = TensorRtOptions(targets=targets, plugin_library=plugin_library(), **given)
        with reporter.progress("exporting") as progress:
            made = export_tensorrt(model, output, options, force=force, progress=progress)
        report, engines = made, [vars(one) for one in made.engines]
    entries = [
        ("bundle", str(report.bundle)),
        ("size", f"{report.bytes:,} bytes ({table.size(report.bytes)})"),
        ("graph", f"{report.nodes:,} nodes"),
        *((one["target"], _engine_text(one)) for one in engines),
        ("cache", f"{report.kv_bytes_per_token:,} bytes a token"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    values = {
        "bundle": str(report.bundle),
        "target": to,
        "bytes": report.bytes,
        "nodes": report.nodes,
        "kv_bytes_per_token": report.kv_bytes_per_token,
        "seconds": report.seconds,
    }
    if to == "tensorrt":
        values["engines"] = engines
    reporter.result(values, table.pairs(entries))


def _engine_text(engine: dict[str, Any]) -> str:
    scratch = ", ".join(table.size(size) for size in engine["scratch_bytes"])
    return (
        f"{table.size(engine['bytes'])}, weights {table.size(engine['weights_bytes'])}, scratch "
        f"{scratch}, built in {engine['seconds']:.0f} s and {table.size(engine['peak_bytes'])}"
    )
