"""Types of options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip

# Not click's own checks for existence: our errors say what to do next.
PATH = click.Path(path_type=Path)


class MemorySize(click.ParamType[int]):
    """`8GB`, `7.4 GiB`, or a number of bytes."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
        if match is None or match[2].upper() not in UNITS:
            self.fail(f"{value!r} is not a size such as 8GB, 7.4GiB or 500MB", param, ctx)
        size = float(match[1]) * UNITS[match[2].upper()]
        if not size < 1 << 63:
            self.fail(f"{str(value)[:40]!r} is more than any machine has", param, ctx)
        return int(size)


class Depths(click.ParamType[tuple[int, ...]]):
    """`0,512,2k`: numbers of tokens, k standing for 1024, each once, in order."""

    name = "tokens"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        found = [re.fullmatch(r"\s*(\d+)(k?)\s*", part) for part in parts]
        if not all(found):
            self.fail(f"{value!r} is not a list of depths such as 0,512,2k", param, ctx)
        return tuple(sorted({int(one[1]) * (1024 if one[2] else 1) for one in found if one}))


threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads that compute. Default: one a core."
)
kernels_option = click.option(
    "--kernels",
    help="Of latent attention in a bundle: native (our operator library), stock (ONNX Runtime's "
    "own), or auto, native where it is installed. Default: auto.",
)
device_option = click.option(
    "--device",
    help="cpu, or cuda: the first GPU. It must be what the bundle was exported for, and is that "
    "where it is not given.",
)


def engine_options(function: Function) -> Function:
    """What a user chooses about the engine of a bundle: `threads`, `kernels`, `device`."""
    return threads_option(kernels_option(device_option(function)))


output_option = click.option("-o", "--output", type=PATH, required=True, help="Folder to write.")
force_option = click.option(
    "--force", is_flag=True, help="Replace the output folder if it is there already."
)
target_ratio_option = click.option(
    "--target-ratio",
    type=float,
    help="Size of the converted cache: numbers a token caches, against the source's.",
)


def generation_options(max_tokens: int) -> Callable[[Function], Function]:
    """What a user chooses about a text, by the names of `GenerationOptions`.

    Args:
        max_tokens: the default.
    """
    options = (
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(min=1),
            default=max_tokens,
            show_default=True,
            help="Tokens to generate at most.",
        ),
        click.option(
            "--temperature",
            type=float,
            default=0.0,
            show_default=True,
            help="Divides the logits before sampling; 0 always takes the likeliest token.",
        ),
        click.option("--top-k", type=int, default=0, help="Sample among the k likeliest; 0: all."),
        click.option(
            "--top-p", type=float, default=1.0, help="Sample among the likeliest of so much mass."
        ),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            help="Leave out what is less likely than so much of the best.",
        ),
        click.option(
            "--seed", type=int, help="The same seed gives the same text. Default: a new one."
        ),
        click.option(
            "--stop", multiple=True, help="End before this text; may be given several times."
        ),
    )

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add
