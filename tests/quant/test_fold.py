"""Folding changes no result before anything is rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import random_model, relative_error, save_checkpoint, transformers_logits

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.model import forward_window, load_model
from mla_deploy.quant.fold import (
    LatentRotation,
    balanced_axes,
    fold_kv_a,
    fold_kv_b,
    hadamard_block,
    latent_sensitivity,
    rotate_blocks,
)
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint


@pytest.mark.parametrize(
    ("rank", "block"), [(512, 64), (128, 64), (96, 32), (40, 8), (6, 2), (7, 1)]
)
def test_the_largest_block_that_divides(rank: int, block: int) -> None:
    assert hadamard_block(rank) == block


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_the_rotation_is_orthogonal_and_undoes_itself(block: int) -> None:
    x = torch.randn(5, 128)
    rotated = rotate_blocks(x, block)
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(rotate_blocks(rotated, block), x, atol=1e-5)


def test_balanced_axes_are_orthogonal_and_order_energy_against_sensitivity() -> None:
    energy, sensitivity = torch.rand(32), torch.rand(32)
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    axes = balanced_axes(turn @ energy.diag() @ turn.T, turn @ sensitivity.diag() @ turn.T)
    assert torch.allclose(axes @ axes.T, torch.eye(32), atol=1e-5)
    order = (energy / energy.sum() - sensitivity / sensitivity.sum()).argsort(descending=True)
    assert torch.allclose((axes @ turn).abs(), torch.eye(32)[order], atol=1e-3)


def test_the_sensitivity_is_that_of_scores_and_output() -> None:
    """Against the mean squared change that random directions cause."""
    heads, nope, rank, v_dim, hidden = 3, 5, 16, 6, 24
    w_uk, w_uv = torch.randn(heads, nope, rank), torch.randn(heads, rank, v_dim)
    o_proj = torch.randn(hidden, heads * v_dim)
    found = latent_sensitivity(w_uk, w_uv, o_proj)
    x = torch.randn(rank)
    key = sum((w_uk[h] @ x).square().sum() for h in range(heads))
    columns = o_proj.unflatten(1, (heads, v_dim))
    value = sum((columns[:, h] @ (x @ w_uv[h])).square().sum() for h in range(heads))
    totals = [
        sum(w_uk[h].square().sum() for h in range(heads)),
        sum((columns[:, h] @ w_uv[h].T).square().sum() for h in range(heads)),
    ]
    assert torch.allclose(x @ found @ x, key / totals[0] + value / totals[1], rtol=1e-4)


def test_an_outlier_is_shared_out_over_its_block_only() -> None:
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    rotated = rotate_blocks(x, 64)
    assert torch.equal(rotated[0, :64], torch.zeros(64))
    assert torch.allclose(rotated[0, 64:].abs(), torch.ones(64))


@pytest.mark.parametrize("calibrated", [False, True])
def test_both_sides_cancel(calibrated: bool) -> None:
    rank, rope = 64, 16
    kv_a, kv_b = torch.randn(rank + rope, 48, dtype=torch.float64), torch.randn(40, rank)
    gamma = torch.rand(rank) + 0.5
    covariance, sensitivity = (torch.cov(torch.randn(rank, 200)) for _ in range(2))
    axes = balanced_axes(covariance, sensitivity) if calibrated else None
    rotation = LatentRotation(32, axes)
    folded_a, folded_b = fold_kv_a(kv_a, rank, rotation), fold_kv_b(kv_b, gamma, rotation)
    expected = kv_b * gamma @ kv_a[:rank].float()
    assert torch.allclose(folded_b @ folded_a[:rank], expected, atol=1e-4)
    assert torch.equal(folded_a[rank:], kv_a[rank:].float())
    bias = torch.randn(rank + rope)
    assert torch.allclose(
        fold_kv_a(bias, rank, rotation), fold_kv_a(bias[:, None], rank, rotation)[:, 0]
    )


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("q_lora", [False, True])
def test_logits_stay_those_of_transformers(
    q_lora: bool, attention_bias: bool, tmp_path: Path
) -> None:
    model = random_model(
        "deepseek_v3", moe=True, yarn=True, q_lora=q_lora, attention_bias=attention_bias
    )
    source = save_checkpoint(model, tmp_path / "source", None)
    ids = torch.randint(0, 192, (60,))
    expected = transformers_logits(model, ids)
    options = QuantizeOptions(kv="fp32", weights="none", rotate=True)
    quantize_checkpoint(source, tmp_path / "folded", options)
    folded = Checkpoint(tmp_path / "folded")
    assert folded.config.recipe.latent_rotation == 64
    assert folded.config.recipe.gamma_folded
    assert "model.layers.0.self_attn.kv_a_layernorm.weight" not in folded.tensors
    found = forward_window(load_model(folded.path), folded.config, ids.unsqueeze(0))[0]
    assert relative_error(found, expected) < 1e-4


def test_tiny_mla_is_unchanged_by_folding(tiny_mla: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(kv="fp32", weights="none", rotate=True)
    quantize_checkpoint(tiny_mla, tmp_path / "folded", options)
    ids = torch.randint(0, 4096, (2, 100))
    logits = [
        forward_window(load_model(path), Checkpoint(path).config, ids)
        for path in (tiny_mla, tmp_path / "folded")
    ]
    assert relative_error(logits[1], logits[0]) < 1e-4
