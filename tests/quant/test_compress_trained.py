"""Conversion of the trained models that ship: what random weights cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_deploy.quant.compress.convert import convert_checkpoint
from mla_deploy.quant.compress.options import ConvertOptions

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mha"])
def test_the_default_method_stays_closest_to_the_source(name: str, tmp_path: Path) -> None:
    divergence = {}
    for method in ("query-aware", "transmla"):
        options = ConvertOptions(
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            method=method,
            calibration=(str(EXAMPLES / "text" / "three-essays.txt"),),
            tokens=2048,
            window=128,
        )
        report = convert_checkpoint(EXAMPLES / "models" / name, tmp_path / method, options)
        assert report.held_out is not None
        divergence[method] = report.held_out.kl
    assert divergence["query-aware"] < 0.9 * divergence["transmla"]
