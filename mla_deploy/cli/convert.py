"""`mla-deploy convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, force_option, output_option, target_ratio_option
from mla_deploy.cli.reporter import Reporter, reporting
from mla_deploy.errors import UsageError

if TYPE_CHECKING:
    from mla_deploy.quant.compress.estimate import Estimate
    from mla_deploy.quant.compress.report import ConversionReport


@click.command()
@click.argument("model", type=PATH)
@output_option
@click.option("--kv-lora-rank", type=int, help="Numbers of the latent, a token and layer.")
@click.option("--qk-rope-head-dim", type=int, help="Channels that keep their rotary positions.")
@target_ratio_option
@click.option(
    "--like-paper",
    metavar="d_kv=N",
    help="Or as MHA2MLA has it: d_kv=64, 32 and 16 are 31.25, 18.75 and 12.5 % of the source.",
)
@click.option("--method", default="query-aware", show_default=True, help="See docs/conversion.md.")
@click.option(
    "--calibration",
    multiple=True,
    metavar="TEXT",
    help="UTF-8 text file to measure on, any number of times; self: the model writes it.",
)
@click.option(
    "--no-calibration", is_flag=True, help="Measure nothing: the weights alone. Needs healing."
)
@click.option("--tokens", type=int, help="Of calibration text, at most. Default: 65536.")
@click.option("--window", type=int, help="Tokens of a window. Default: 512, or the context.")
@click.option(
    "--layout",
    default="mla_deploy",
    show_default=True,
    help="mla_deploy: exact; deepseek_v3: for stock engines.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--heal",
    multiple=True,
    metavar="TEXT",
    help="UTF-8 text file to train on after converting, any number of times.",
)
@click.option(
    "--heal-tokens",
    type=int,
    help="To train on: each layer by itself, then the whole model. Default: 1048576.",
)
@click.option("--device", help="That heals: cpu, cuda. Default: cpu.")
@click.option("--precision", help="Of healing: fp32 or bf16. Default: fp32.")
@click.option("--dry-run", is_flag=True, help="Show sizes, memory and time, and do nothing.")
@force_option
@reporting
def command(
    reporter: Reporter,
    /,
    model: Path,
    output: Path,
    force: bool,
    dry_run: bool,
    like_paper: str | None,
    **options: Any,
) -> None:
    """Turn the attention of MODEL (Llama, Mistral, Qwen2, Qwen3, SmolLM) into latent attention.

    Works layer by layer on the CPU. A run that was killed goes on where it stopped when it is
    repeated. The result is a checkpoint for quantize, export and run.
    """
    from mla_deploy.quant.compress.convert import convert_checkpoint
    from mla_deploy.quant.compress.estimate import estimate
    from mla_deploy.quant.compress.options import ConvertOptions

    chosen = ConvertOptions(like_paper=_d_kv(like_paper), **options)
    if dry_run:
        found = estimate(model, chosen)
        reporter.result({"model": str(model), **found.to_json()}, _estimate_text(found))
        return
    if chosen.no_calibration:
        reporter.note("nothing is measured: expect a model that must be healed to be of use")
    with reporter.progress("converting") as progress:
        report = convert_checkpoint(model, output, chosen, progress, say=reporter.note, force=force)
    values = {"model": str(model), "output": str(output), **report.to_json()}
    reporter.result(values, _text(output, report))


def _d_kv(text: str | None) -> int | None:
    if text is None:
        return None
    name, _, number = text.partition("=")
    if name != "d_kv" or not number.isdecimal():
        raise UsageError("--like-paper is not of the form d_kv=64", found=text, allowed="d_kv=N")
    return int(number)


def _text(output: Path, report: ConversionReport) -> str:
    from mla_deploy.inspection import described_formats

    rows = [
        (
            str(layer.layer),
            _share(layer.rope_loss),
            _share(layer.rank_loss),
            _share(layer.output_error),
        )
        for layer in report.layers
    ]
    head = ("layer", "positions lost", "rank lost", "output error")
    source = report.source_bytes_per_token
    entries = [
        ("output", str(output)),
        ("latent", f"{report.geometry.text} ({report.geometry.ratio(report.source):.2%})"),
        ("cache", f"{source:,} bytes a token in the source (fp16)"),
    ]
    entries += [
        ("", f"{size:,} in {described_formats(formats)} ({1 - size / source:.2%} less)")
        for formats, size in report.bytes_per_token().items()
    ]
    if (held_out := report.held_out) is not None:
        quarters = zip(held_out.loss_by_quarter, held_out.converted_loss_by_quarter, strict=True)
        entries += [
            ("loss", f"{held_out.loss:.4f} before, {held_out.converted_loss:.4f} after"),
            ("", f"on {held_out.tokens:,} held-out tokens"),
            ("KL divergence", f"{held_out.kl:.4f} nats a token"),
            ("top-1 agreement", f"{held_out.top1_agreement:.2%}"),
            ("far back", ", ".join(f"{after - before:+.4f}" for before, after in quarters)),
            ("", "loss by quarter of a window"),
        ]
    if (curve := report.distillation) is not None:
        entries.append(("healed", f"loss and KL from {curve.loss[0]:.4f} to {curve.loss[-1]:.4f}"))
    entries.append(("time", f"{report.seconds:.1f} s"))
    if report.resumed_layers:
        entries.append(("resumed", f"{report.resumed_layers} layers were there already"))
    return "\n".join([table.table(head, rows), "", table.pairs(entries)])


def _estimate_text(found: Estimate) -> str:
    entries = [
        ("latent", " or ".join(size.text for size in found.sizes)),
        ("ratio", ", ".join(f"{size.ratio(found.source):.2%}" for size in found.sizes)),
        ("memory", f"about {table.size(found.memory_bytes)}"),
        ("output", table.size(found.output_bytes)),
        ("time", f"about {found.seconds:,.0f} s on this machine"),
    ]
    if len(found.sizes) > 1:
        entries.insert(1, ("", "the best is chosen by trial"))
    return table.pairs(entries)


def _share(value: float) -> str:
    return "-" if value != value else f"{value:.3%}"
