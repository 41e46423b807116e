"""`mla-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, Depths, kernels_option, threads_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.evaluate.speed import Rate, SpeedAtDepth
    from mla_deploy.runtime import Engine


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--depth",
    "depths",
    type=Depths(),
    default="0,512",
    show_default=True,
    help="Tokens in the cache before the timed ones, separated by commas.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of the timed prefill.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Timed decode steps.",
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Of each measurement; the median is given.",
)
@threads_option
@kernels_option
@reporting
def command(
    reporter: Reporter,
    bundle: Path,
    depths: tuple[int, ...],
    prompt_tokens: int,
    max_tokens: int,
    repetitions: int,
    threads: int | None,
    kernels: str | None,
) -> None:
    """Time prefill and decode of BUNDLE at several depths of context.

    A depth is filled with copies of the cache pages of a real prefix.
    """
    from mla_deploy.bundle import Bundle
    from mla_deploy.evaluate.speed import check_depths, measure_speed
    from mla_deploy.runtime import load

    model = Bundle.open(bundle).manifest.model
    context = model.max_position_embeddings
    new_tokens = max(prompt_tokens, max_tokens)
    check_depths(depths, context, new_tokens)
    engine = load(
        bundle, max_tokens=max(depths) + new_tokens, threads=threads, kernels=kernels or "auto"
    )
    with reporter.progress("measuring") as progress:
        found = measure_speed(
            engine.session,
            model.vocab_size,
            context,
            depths,
            prompt_tokens=prompt_tokens,
            decode_tokens=max_tokens,
            repetitions=repetitions,
            progress=progress,
        )
    values = {
        "bundle": str(bundle),
        "kernels": engine.kernels.name,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": max_tokens,
        "repetitions": repetitions,
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "results": [_values(one, engine) for one in found],
    }
    reporter.result(values, _text(found, engine, values))


def _values(found: SpeedAtDepth, engine: Engine) -> dict[str, Any]:
    return {
        "depth": found.depth,
        "prefill_tokens_per_s": found.prefill.median,
        "prefill_tokens_per_s_range": [found.prefill.slowest, found.prefill.fastest],
        "decode_tokens_per_s": found.decode.median,
        "decode_tokens_per_s_range": [found.decode.slowest, found.decode.fastest],
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "peak_rss_bytes": found.peak_rss_bytes,
    }


def _text(found: list[SpeedAtDepth], engine: Engine, values: dict[str, Any]) -> str:
    head = ("depth", "prefill tokens/s", "(range)", "decode tokens/s", "(range)", "peak memory")
    rows = [
        (
            f"{one.depth:,}",
            f"{one.prefill.median:.1f}",
            _range(one.prefill),
            f"{one.decode.median:.1f}",
            _range(one.decode),
            table.size(one.peak_rss_bytes),
        )
        for one in found
    ]
    return "\n".join(
        [
            f"{values['bundle']}: {values['prompt_tokens']} tokens of prefill, "
            f"{values['decode_tokens']} decode steps, median of {values['repetitions']}",
            "",
            table.table(head, rows),
            "",
            f"cache {engine.kv_bytes_per_token:.0f} bytes a token; kernels: {engine.kernels}",
        ]
    )


def _range(rate: Rate) -> str:
    return f"({rate.slowest:.1f}-{rate.fastest:.1f})"
