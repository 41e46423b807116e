"""What a conversion did, as figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mla_deploy.cache import cache_formats, cache_record, formats_of_layers
from mla_deploy.errors import ConfigError
from mla_deploy.inspection import joined_formats
from mla_deploy.output import writing
from mla_deploy.quant.compress.geometry import Geometry
from mla_deploy.quant.compress.heal import Curve
from mla_deploy.quant.compress.options import ConvertOptions
from mla_deploy.quant.compress.source import SourceConfig
from mla_deploy.quant.compress.streams import HeldOut

REPORT_JSON = "report.json"


@dataclass(frozen=True)
class LayerReport:
    """One layer."""

    layer: int
    rope_loss: float
    """Share of the score power that lost its positions; NaN where the method does not know."""
    rank_loss: float
    """Share of the variance, in the method's own metric, that the latent leaves out."""
    output_error: float
    """Squared error of the attention output on held-out text, relative; NaN without calibration."""
    choices: dict[str, float]
    """What was chosen by trial."""
    inv_freq: tuple[float, ...]
    """Of the rotary pairs."""
    latent_power: float
    """E|c_kv|^2 on the calibration text."""
    match: Curve | None
    """Of healing this layer by itself: the relative squared error of its output."""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` did."""

    options: ConvertOptions
    source: SourceConfig
    geometry: Geometry
    layers: tuple[LayerReport, ...]
    held_out: HeldOut | None
    """None without calibration."""
    distillation: Curve | None
    """Of healing the whole model; None without."""
    calibration_tokens: int
    resumed_layers: int
    """Converted by an earlier, interrupted run."""
    seconds: float

    @property
    def source_bytes_per_token(self) -> int:
        """The source's cache in float16, all layers."""
        return 2 * self.source.cached_numbers * self.source.num_hidden_layers

    def bytes_per_token(self) -> dict[tuple[str, ...], int]:
        """The converted model's cache by the record of each layer, scales and zeros included: each
        format in all of them, and what `quantize` makes without options."""
        layers = self.source.num_hidden_layers
        sizes = self.geometry.kv_lora_rank, self.geometry.qk_rope_head_dim
        found = {}
        uniform = [(name,) * layers for name in cache_formats()]
        for formats in (*uniform, formats_of_layers(layers)):
            try:
                each = [cache_record(name).bytes_per_token(*sizes) for name in formats]
            except ConfigError:  # a format that cannot hold this latent
                continue
            found[formats] = sum(each)
        return found

    def to_json(self) -> dict[str, Any]:
        """For `--json` and `REPORT_JSON`."""
        cached = {joined_formats(key): size for key, size in self.bytes_per_token().items()}
        return {
            "method": self.options.method,
            "layout": self.options.layout,
            "calibration": list(self.options.calibration),
            "calibration_tokens": self.calibration_tokens,
            "seed": self.options.seed,
            "source_model_type": self.source.model_type,
            "kv_lora_rank": self.geometry.kv_lora_rank,
            "qk_rope_head_dim": self.geometry.qk_rope_head_dim,
            "ratio": self.geometry.ratio(self.source),
            "source_bytes_per_token_fp16": self.source_bytes_per_token,
            "bytes_per_token": cached,
            "cache_share": {
                name: size / self.source_bytes_per_token for name, size in cached.items()
            },
            "held_out": None if self.held_out is None else asdict(self.held_out),
            "distillation": None if self.distillation is None else asdict(self.distillation),
            "layers": [asdict(layer) for layer in self.layers],
            "resumed_layers": self.resumed_layers,
            "seconds": self.seconds,
        }


def write_json(report: ConversionReport, folder: Path) -> None:
    """Put `REPORT_JSON` into the result."""
    text = json.dumps(_without_nan(report.to_json()), indent=1) + "\n"
    with writing(folder):
        (folder / REPORT_JSON).write_text(text, encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
