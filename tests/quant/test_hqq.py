"""The solver against the `hqq` package, against an exhaustive search, and on hard inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mla_deploy.errors import CheckpointError
from mla_deploy.quant.hqq import LARGEST_SCALE, Groups, solve

KINDS = ("exact", "integer")
GROUP = 64


def restore(solved: Groups) -> torch.Tensor:
    """The weights that the groups stand for, in float64."""
    steps = solved.codes.double() - solved.zero.double()
    return steps * solved.scale.double()


def squared_error(x: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    return (x.double() - restored.double()).square().sum(-1)


def samples(name: str, tiny_mla: Path) -> torch.Tensor:
    """Groups [G, 64] of the kinds of weights there are."""
    if name == "normal":
        return torch.randn(1000, GROUP) * 0.02
    if name == "heavy tails":
        return torch.distributions.StudentT(3.0).sample((1000, GROUP)) * 0.02
    if name == "beside zero":
        return torch.randn(1000, GROUP) * 0.02 + 0.05
    tensors = load_file(tiny_mla / "model.safetensors")
    return tensors["model.layers.1.self_attn.o_proj.weight"].float().reshape(-1, GROUP)


SAMPLES = ("normal", "heavy tails", "beside zero", "tiny-mla")


def package_groups(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero of the `hqq` package, in float32."""
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        x, nbits=bits, group_size=GROUP, axis=1, optimize=True, device="cpu", bitpack=False
    )
    return codes.float(), meta["scale"], meta["zero"]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bits", [4, 8])
def test_no_group_is_worse_than_the_package(name: str, bits: int, tiny_mla: Path) -> None:
    x = samples(name, tiny_mla)
    codes, scale, zero = package_groups(x, bits)
    if bits == 8:  # where rounding scale and zero to float16 is a part of the error
        scale, zero = scale.half().float(), zero.half().float()
    theirs = squared_error(x, (codes - zero) * scale)
    ours = squared_error(x, restore(solve(x, bits, "exact")))
    share_worse = float((ours > 1.01 * theirs).float().mean())
    assert share_worse <= (0.001 if bits == 4 else 0.02)
    assert float(ours.sum() / theirs.sum()) < (0.95 if bits == 4 else 1.0)


@pytest.mark.parametrize("name", SAMPLES)
def test_whole_zeros_cost_little(name: str, tiny_mla: Path) -> None:
    x = samples(name, tiny_mla)
    codes, scale, zero = package_groups(x, 4)
    whole = zero.round().clamp(0, 15)
    rounded = squared_error(x, ((x / scale + whole).round().clamp(0, 15) - whole) * scale).sum()
    exact = squared_error(x, (codes - zero) * scale).sum()
    ours = squared_error(x, restore(solve(x, 4, "integer"))).sum()
    assert ours < 0.96 * rounded
    assert ours < 1.2 * exact


def test_close_to_an_exhaustive_search() -> None:
    x = torch.randn(200, 32) * 0.02
    span = x.amax(-1) - x.amin(-1)
    best = torch.full((200,), float("inf"), dtype=torch.float64)
    for part in torch.linspace(0.5, 1.1, 241):
        scale = (part * span / 15).unsqueeze(-1).double()
        for zero in range(16):
            codes = (x / scale + zero).round().clamp(0, 15)
            best = torch.minimum(best, squared_error(x, (codes - zero) * scale))
    ours = squared_error(x, restore(solve(x, 4, "integer")))
    assert float(ours.sum() / best.sum()) < 1.06


@pytest.mark.parametrize("zeros", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_reports_the_error_it_makes(zeros: str, bits: int) -> None:
    x = torch.randn(200, GROUP)
    solved = solve(x, bits, zeros)
    expected = squared_error(x, restore(solved))
    assert torch.allclose(solved.squared_error.squeeze(-1).double(), expected, rtol=1e-3)
    assert solved.zero.dtype is (torch.uint8 if zeros == "integer" else torch.float16)
    assert solved.scale.dtype is torch.float16
    assert solved.codes.dtype is torch.uint8


@pytest.mark.parametrize("zeros", KINDS)
def test_a_group_depends_on_nothing_else(zeros: str) -> None:
    x = torch.randn(50, GROUP) * torch.logspace(-4, 3, 50).unsqueeze(-1)
    together = solve(x, 4, zeros)
    for index in range(50):
        alone = solve(x[index : index + 1], 4, zeros)
        assert torch.equal(alone.codes[0], together.codes[index])
        assert torch.equal(alone.scale[0], together.scale[index])
        assert torch.equal(alone.zero[0], together.zero[index])


@pytest.mark.parametrize("zeros", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -0.02, 1000.0, 1e-3])
def test_constants_are_kept(zeros: str, value: float) -> None:
    x = torch.full((1, GROUP), value)
    assert torch.allclose(restore(solve(x, 4, zeros)).float(), x, rtol=1e-3, atol=0)


@pytest.mark.parametrize("zeros", KINDS)
@pytest.mark.parametrize("value", [1.0, -1.0, 1e4, 2e-3])
def test_one_hot_is_kept(zeros: str, value: float) -> None:
    x = torch.zeros(1, GROUP)
    x[0, 7] = value
    assert torch.allclose(restore(solve(x, 4, zeros)).float(), x, rtol=2e-3, atol=abs(value) * 1e-3)


@pytest.mark.parametrize("zeros", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("power", [-45, -40, -37, -30, -20, -10, -8])
def test_weights_below_float16_become_zero(power: int, bits: int, zeros: str) -> None:
    one_hot = torch.zeros(GROUP)
    one_hot[-1] = 1.0
    x = torch.stack([one_hot, -one_hot, torch.ones(GROUP), torch.randn(GROUP)]) * 10.0**power
    solved = solve(x, bits, zeros)
    assert bool(torch.isfinite(solved.zero.float()).all())
    # the smallest step of float16 is 6e-8; a scale below half of it is stored as zero
    assert float((restore(solved) - x).abs().max()) <= min(float(x.abs().max()), 3e-8 * 2**bits)


@pytest.mark.parametrize("zeros", KINDS)
def test_narrow_groups_far_from_zero_stay_where_they_are(zeros: str) -> None:
    x = 1.0 + torch.randn(20, GROUP) * 1e-4
    restored = restore(solve(x, 4, zeros))
    assert float((restored - x).abs().max()) < 2e-3


@pytest.mark.parametrize("zeros", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_refuses_what_float16_scales_cannot_hold(zeros: str, bits: int) -> None:
    x = torch.randn(3, GROUP)
    x[1, 5] = LARGEST_SCALE * (2**bits - 1) * 1.01
    with pytest.raises(CheckpointError, match="too large"):
        solve(x, bits, zeros)
    x[1, 5] = float("inf")
    with pytest.raises(CheckpointError, match="too large"):
        solve(x, bits, zeros)


@settings(max_examples=150, deadline=None)
@given(
    magnitudes=st.lists(
        st.tuples(st.integers(-45, 5), st.floats(-1, 1, width=32)), min_size=32, max_size=32
    ),
    bits=st.sampled_from([4, 8]),
    zeros=st.sampled_from(KINDS),
)
def test_any_group_is_at_least_as_good_as_rounding(
    magnitudes: list[tuple[int, float]], bits: int, zeros: str
) -> None:
    """From denormals to huge outliers beside each other: finite, and never worse than the plain
    rounding of the range, except for what float16 scales below its normal range lose."""
    x = torch.tensor([[value * 10.0**power for power, value in magnitudes]])
    solved = solve(x, bits, zeros)
    assert int(solved.codes.max()) < 2**bits
    assert bool(torch.isfinite(restore(solved)).all())
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.where(scale > 0, -low / scale, 0.0).round()
    codes = torch.where(scale > 0, x / scale, 0.0).add(zero).round()
    plain = squared_error(x, (codes - zero) * scale)
    lost = (2.0**-25 * 2**bits) ** 2 * x.shape[-1] + 1e-6 * float(x.square().sum())
    assert float(squared_error(x, restore(solved))) <= 1.1 * float(plain) + lost
