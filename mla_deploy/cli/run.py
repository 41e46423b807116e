"""`mla-deploy run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli.options import PATH, device_option, kernels_option, threads_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.runtime import Engine, GenerationResult


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompt")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Divides the logits before sampling; 0 always takes the likeliest token.",
)
@click.option("--top-k", type=int, default=0, help="Sample among the k likeliest; 0: all.")
@click.option(
    "--top-p", type=float, default=1.0, help="Sample among the likeliest of so much mass."
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    help="Leave out what is less likely than so much of the best.",
)
@click.option("--seed", type=int, help="The same seed gives the same text. Default: a new one.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's turn of a conversation.")
@threads_option
@kernels_option
@device_option
@reporting
def command(
    reporter: Reporter,
    bundle: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    chat: bool,
    threads: int | None,
    kernels: str | None,
    device: str | None,
) -> None:
    """Continue PROMPT with the model in BUNDLE; `-` reads the prompt from standard input.

    The text comes on standard output as it is made, the figures on standard error.
    """
    from mla_deploy.evaluate.text import decode_text
    from mla_deploy.runtime import GenerationOptions, load

    options = GenerationOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    if prompt == "-":
        prompt = decode_text(sys.stdin.buffer.read(), "standard input")
    engine = load(bundle, threads=threads, kernels=kernels or "auto", device=device)
    reporter.kernels(engine.kernels, kernels)
    asked = engine.tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else prompt
    with engine.stream(asked, options) as generation:
        for event in generation:
            if not reporter.json:
                click.echo(event.text, nl=False)
    if not reporter.json:
        click.echo()
    result = generation.result
    reporter.note(_figures(engine, result))
    if reporter.json:
        reporter.result(_values(engine, bundle, result), "")


def _figures(engine: Engine, result: GenerationResult) -> str:
    took = result.statistics
    parts = [f"prompt {took.prompt_tokens} tokens"]
    if took.prefill_tokens_per_s is not None:
        parts[0] += f" at {took.prefill_tokens_per_s:.1f} tokens/s"
    parts.append(f"{took.generated_tokens} generated")
    if took.decode_tokens_per_s is not None:
        parts[1] += f" at {took.decode_tokens_per_s:.1f} tokens/s"
    parts.append(f"cache {engine.kv_bytes_per_token:.0f} bytes a token")
    parts += [f"{engine.kernels.name} kernels", f"ended by {result.finish_reason}"]
    return "\n[" + "; ".join(parts) + "]"


def _values(engine: Engine, bundle: Path, result: GenerationResult) -> dict[str, Any]:
    took = result.statistics
    return {
        "bundle": str(bundle),
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "prompt_tokens": took.prompt_tokens,
        "generated_tokens": took.generated_tokens,
        "prefill_seconds": took.prefill_seconds,
        "prefill_tokens_per_s": took.prefill_tokens_per_s,
        "decode_seconds": took.decode_seconds,
        "decode_tokens_per_s": took.decode_tokens_per_s,
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "kernels": engine.kernels.name,
        "cache_bytes": took.cache_bytes,
    }
