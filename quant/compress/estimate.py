"""What a conversion would cost, before any of it is done."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla_deploy.quant.compress.calibration import MAX_HELD_OUT
from mla_deploy.quant.compress.convert import DEFAULT_WINDOW
from mla_deploy.quant.compress.geometry import Geometry, candidates
from mla_deploy.quant.compress.methods import GAMMAS
from mla_deploy.quant.compress.options import DEFAULT_TOKENS, ConvertOptions
from mla_deploy.quant.compress.source import Source, SourceConfig

_FIXED_BYTES = 400_000_000
"""Of the interpreter and its libraries."""
_EIGEN_FLOPS = 25
"""Of an eigendecomposition [n, n], in n^3."""
_PROBE = 1024


@dataclass(frozen=True)
class Estimate:
    """Rough figures: the time is that of the matrix products, at the speed of this machine now."""

    source: SourceConfig
    sizes: tuple[Geometry, ...]
    """One, or those that would be tried."""
    memory_bytes: int
    output_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        sizes = [
            {**dataclasses.asdict(size), "ratio": size.ratio(self.source)} for size in self.sizes
        ]
        return {
            "sizes": sizes,
            "memory_bytes": self.memory_bytes,
            "output_bytes": self.output_bytes,
            "seconds": self.seconds,
        }


def estimate(path: Path | str, options: ConvertOptions) -> Estimate:
    """Read the headers of a checkpoint and say what converting it takes.

    Raises:
        as `convert_checkpoint`, for what is known without reading weights or text.
    """
    source = Source(path)
    config = source.config
    sizes = candidates(config, options)
    hidden, cached = config.hidden_size, config.cached_numbers
    layer_numbers = (
        hidden * (2 * config.attention_width + cached) + 3 * hidden * config.intermediate_size
    )
    fitted = 0 if options.no_calibration else options.tokens or DEFAULT_TOKENS
    held_out = min(fitted // 10, MAX_HELD_OUT)
    window = options.window or min(DEFAULT_WINDOW, config.max_position_embeddings)
    token_flops = 2 * layer_numbers + cached**2 + 2 * window * config.attention_width
    largest = max(sizes, key=lambda size: size.numbers)
    latent_flops = window * config.num_attention_heads * 4 * largest.numbers
    layer_flops = (
        fitted * token_flops
        + held_out * (3 * token_flops + 2 * latent_flops)
        + 4096 * latent_flops * len(GAMMAS)
        + _EIGEN_FLOPS * len(GAMMAS) * 2 * cached**3
    )
    if len(sizes) > 1:
        layer_flops += len(sizes) * (4096 * (token_flops + latent_flops) + 50 * cached**3)
    head = config.vocab_size * hidden
    total = layer_flops * config.num_hidden_layers + 4 * held_out * head
    streams = 4 * hidden * (fitted + 2 * held_out)
    moments = 8 * (6 * cached**2 + 3 * config.num_attention_heads * cached * config.head_dim)
    return Estimate(
        source=config,
        sizes=tuple(sizes),
        memory_bytes=_FIXED_BYTES + streams + 10 * layer_numbers + moments + 2 * head,
        output_bytes=source.plain_bytes,
        seconds=total / _flops_per_second(),
    )


def _flops_per_second() -> float:
    """Of a product of matrices in float32."""
    a = torch.ones(_PROBE, _PROBE)
    a @ a
    started = time.perf_counter()
    a @ a
    return 2 * _PROBE**3 / (time.perf_counter() - started)
