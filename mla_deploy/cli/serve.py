"""`mla-deploy serve`."""

from __future__ import annotations

from pathlib import Path

import click

from mla_deploy.cli.loading import load_engine
from mla_deploy.cli.options import PATH, engine_options
from mla_deploy.cli.reporter import Reporter, reporting


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0: any that is free.",
)
@click.option(
    "--api-key",
    envvar="MLA_DEPLOY_API_KEY",
    help="What requests must bring as bearer token. Better given as MLA_DEPLOY_API_KEY: other "
    "users of the machine see options. Default: none is needed.",
)
@click.option("--model-name", help="Of the model in requests. Default: the bundle's folder.")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Requests that are computed together; four times as many may wait.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Tokens that the cache holds, of all requests together. Default: the model's context.",
)
@engine_options
@reporting
def command(
    reporter: Reporter,
    bundle: Path,
    host: str,
    port: int,
    api_key: str | None,
    model_name: str | None,
    parallel: int,
    max_tokens: int | None,
    threads: int | None,
    kernels: str | None,
    device: str | None,
) -> None:
    """Answer requests of OpenAI's protocol with the model in BUNDLE.

    At /v1/completions and /v1/chat/completions, until Ctrl-C. With --json the object is printed
    when the server is about to listen.
    """
    from mla_deploy.runtime.serve.server import Server, ServerOptions, bind, require_extra

    require_extra()
    options = ServerOptions(model_name=model_name, parallel=parallel, api_key=api_key)
    with bind(host, port) as bound:
        engine = load_engine(
            reporter,
            bundle,
            max_tokens=max_tokens,
            threads=threads,
            kernels=kernels,
            device=device,
        )
        server = Server(engine, bound, options)
        for warning in server.warnings:
            reporter.note(f"warning: {warning}")
        values = {
            "url": server.url,
            "model": server.model_name,
            "parallel": parallel,
            "max_tokens": engine.capacity_tokens,
            "kv_bytes_per_token": engine.kv_bytes_per_token,
            "kernels": engine.kernels.name,
        }
        reporter.result(values, f"{server.model_name} at {server.url}")
        server.run()
