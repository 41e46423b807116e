"""`mla-deploy eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, kernels_option, threads_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.evaluate import Evaluation


@click.command()
@click.argument("model", type=PATH)
@click.option("--text", type=PATH, required=True, help="UTF-8 text file to score.")
@click.option("--reference", type=PATH, help="Checkpoint or bundle to compare with.")
@click.option("--window", type=int, help="Tokens seen at a time. Default: 512, or the context.")
@click.option(
    "--stride", type=int, help="Tokens between windows. Default: the window, so no overlap."
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=2),
    help="Score only so many tokens from the start of the text.",
)
@threads_option
@kernels_option
@reporting
def command(
    reporter: Reporter,
    model: Path,
    text: Path,
    reference: Path | None,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    threads: int | None,
    kernels: str | None,
) -> None:
    """Score a text: perplexity, and the distance to a reference.

    MODEL and --reference are checkpoints (computed by the torch reference) or bundles (computed by
    the runtime).
    """
    from mla_deploy.cli.scorers import open_scorers
    from mla_deploy.evaluate import evaluate, read_text

    content = read_text(text)
    paths = [model] if reference is None else [model, reference]
    scorers = open_scorers(paths, threads, kernels)
    with reporter.progress("scoring tokens") as progress:
        found = evaluate(
            scorers[0],
            content,
            reference=scorers[1] if reference is not None else None,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            progress=progress,
        )
    reporter.result(_values(found, model, reference, text), _text(found, reference))


def _values(found: Evaluation, model: Path, reference: Path | None, text: Path) -> dict[str, Any]:
    values = asdict(found)
    values.update(values.pop("comparison") or {})
    return {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "text": str(text),
        **values,
    }


def _text(found: Evaluation, reference: Path | None) -> str:
    bits = "-" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    entries = [
        ("tokens", f"{found.tokens:,} ({found.bytes:,} bytes of text)"),
        ("windows", f"{found.window} tokens, every {found.stride}"),
        ("perplexity", f"{found.perplexity:.4f}"),
        ("bits per byte", bits),
    ]
    if (compared := found.comparison) is not None:
        change = found.perplexity / compared.reference_perplexity - 1
        entries += [
            ("", ""),
            ("reference", str(reference)),
            ("its perplexity", f"{compared.reference_perplexity:.4f} (this model: {change:+.3%})"),
            (
                "KL divergence",
                f"mean {compared.kl_mean:.3g}, median {compared.kl_median:.3g}, "
                f"p99 {compared.kl_p99:.3g}, max {compared.kl_max:.3g} nats",
            ),
            ("top-1 agreement", f"{compared.top1_agreement:.3%}"),
        ]
    return table.pairs(entries)
