"""Error feedback: nothing to pass on without correlation, less error of the outputs with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import UsageError
from mla_deploy.packing import dequantize
from mla_deploy.quant.feedback import quantize_with_feedback
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.quant.weights import QuantizedMatrix, quantize_matrix
from mla_deploy.recipe import WeightFormat

ESSAYS = Path(__file__).parents[2] / "examples" / "text" / "three-essays.txt"


def restored(matrix: QuantizedMatrix, bits: int) -> torch.Tensor:
    return dequantize(matrix.codes, matrix.scales, matrix.zeros, bits, torch.float32)


@pytest.mark.parametrize("zeros", ["integer", "exact"])
@pytest.mark.parametrize("bits", [4, 8])
def test_without_correlation_it_is_the_solver_alone(bits: int, zeros: str) -> None:
    weight = torch.randn(24, 128)
    chosen = WeightFormat(bits, 64, zeros)
    found = quantize_with_feedback(weight, torch.rand(128).diag() + torch.eye(128), chosen)
    expected = quantize_matrix(weight, chosen)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zeros, expected.zeros)
    step = expected.scales.float().repeat_interleave(64, 1)
    gap = (restored(found, bits) - restored(expected, bits)).abs()
    assert bool((gap <= 1.01 * step).all())
    assert float((gap > 0).float().mean()) < 1e-2  # values on an edge between two codes
    assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-2)


@pytest.mark.parametrize("zeros", ["integer", "exact"])
def test_with_correlation_the_outputs_are_nearer(zeros: str) -> None:
    weight = torch.randn(48, 128)
    inputs = torch.randn(400, 20) @ torch.randn(20, 128) + 0.3 * torch.randn(400, 128)
    chosen = WeightFormat(4, 32, zeros)
    fed = quantize_with_feedback(weight, inputs.T @ inputs, chosen)
    alone = quantize_matrix(weight, chosen)
    errors = [
        float((inputs @ (restored(one, 4) - weight).T).square().sum()) for one in (fed, alone)
    ]
    assert errors[0] < 0.4 * errors[1]
    noise = (restored(fed, 4) - weight).double().square().sum()
    assert fed.squared_error == pytest.approx(float(noise), rel=1e-4)


def test_an_input_that_is_always_zero() -> None:
    moments = torch.eye(64)
    moments[5] = moments[:, 5] = 0
    found = quantize_with_feedback(torch.randn(4, 64), moments, WeightFormat(4, 64))
    assert bool(restored(found, 4).isfinite().all())


def test_a_checkpoint_with_feedback_is_whole_and_nearer(tiny_mla: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(ESSAYS.read_text(encoding="utf-8")[:1800], encoding="utf-8")
    common = {"kv": "fp32", "rotate": False, "calibration": (str(text),), "lm_head": "int4"}
    for name in ("alone", "fed"):
        options = QuantizeOptions(**common, feedback=name == "fed")  # type: ignore[arg-type]
        report = quantize_checkpoint(tiny_mla, tmp_path / name, options)
    assert not list((tmp_path / "fed").glob("*moments*"))
    linear = report.kinds["linear"]
    assert linear.nmse is not None
    alone, fed = Checkpoint(tmp_path / "alone"), Checkpoint(tmp_path / "fed")
    changed = {
        name.rpartition(".")[0]
        for name in fed.tensors
        if name.endswith(".codes") and not torch.equal(fed.read(name), alone.read(name))
    }
    assert any("q_b_proj" in name for name in changed)
    assert any("lm_head" in name for name in changed)
    assert not any(".experts." in name and "shared" not in name for name in changed)


def test_feedback_needs_a_calibration() -> None:
    with pytest.raises(UsageError, match="needs the inputs"):
        QuantizeOptions(feedback=True)
    with pytest.raises(UsageError, match="for matrices that are quantised"):
        QuantizeOptions(feedback=True, weights="none", calibration=("text",))
