"""`mla-deploy run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli.loading import load_engine
from mla_deploy.cli.options import PATH, engine_options, generation_options
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.runtime import Engine, GenerationResult


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("prompt")
@generation_options(max_tokens=256)
@click.option("--chat", is_flag=True, help="Take the prompt as a user's turn of a conversation.")
@engine_options
@reporting
def command(
    reporter: Reporter,
    /,
    bundle: Path,
    prompt: str,
    chat: bool,
    threads: int | None,
    kernels: str | None,
    device: str | None,
    **generation_choices: Any,
) -> None:
    """Continue PROMPT with the model in BUNDLE; `-` reads the prompt from standard input.

    The text comes on standard output as it is made, the figures on standard error.
    """
    from mla_deploy.evaluate.text import decode_text
    from mla_deploy.runtime import GenerationOptions

    options = GenerationOptions(**generation_choices)
    if prompt == "-":
        prompt = decode_text(sys.stdin.buffer.read(), "standard input")
    engine = load_engine(reporter, bundle, threads=threads, kernels=kernels, device=device)
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
