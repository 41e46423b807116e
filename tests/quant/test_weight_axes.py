"""Balanced axes of the weights alone: what they are, and that they pay on a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.families import load_config
from mla_deploy.model import build, load_model
from mla_deploy.modules.decoder import DecoderLayer
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.fold import LatentRotation, balanced_axes, latent_sensitivity
from mla_deploy.quant.weight_axes import weight_rotation
from mla_deploy.quant.window_run import WindowRun, divergence, rotated


def rotations(model: Path) -> list[LatentRotation]:
    checkpoint = Checkpoint(model)
    layers = build(checkpoint.config).layers
    found = []
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        found.append(weight_rotation(checkpoint, layer, 64))
    return found


def test_the_axes_sort_energy_against_sensitivity(tiny_mla: Path) -> None:
    """Both moments, by hand from the loaded model, in the axes' order."""
    rotation = rotations(tiny_mla)[1]
    assert rotation.axes is not None
    axes = rotation.axes.double()
    assert torch.allclose(axes @ axes.T, torch.eye(128, dtype=torch.float64), atol=1e-5)
    layer = load_model(tiny_mla).layers[1]
    attention = layer.self_attn
    writes = attention.qkv_a_proj.weight.double()[96 : 96 + 128]  # behind q_lora_rank
    latent = writes @ layer.input_layernorm.weight.double().diag()
    w_uk, w_uv = attention.w_uk.double(), attention.w_uv.double()
    o_proj = attention.o_proj.weight.double().unflatten(1, (8, 32))
    key = torch.einsum("hnr,hns->rs", w_uk, w_uk)
    out = torch.einsum("hrv,ohv->hro", w_uv, o_proj)
    value = torch.einsum("hro,hso->rs", out, out)
    energy = latent @ latent.T
    sensitivity = key / key.trace() + value / value.trace()
    gap = energy / energy.trace() - sensitivity / sensitivity.trace()
    turned = axes @ gap @ axes.T
    order = turned.diagonal()
    assert torch.allclose(turned, order.diag(), atol=1e-6)
    assert bool((order.diff() <= 1e-7).all())


@torch.no_grad()
def test_they_halve_what_int4_costs_a_trained_model(tiny_mla: Path, short_text: Path) -> None:
    config, model = load_config(tiny_mla), load_model(tiny_mla)
    ids = CalibrationText.read([short_text], tiny_mla, config).windows[0]

    def cost(bases: list[LatentRotation]) -> float:
        run = WindowRun(model, config, ids)
        exact = state = run.start
        for layer, rotation in enumerate(bases):
            exact = run.layer(layer, *exact)
            with rotated(run.attention(layer), rotation):
                state = run.layer(layer, *state, "int4")
        expected, found = (run.log_probabilities(*one) for one in (exact, state))
        return divergence(expected, found)

    assert cost(rotations(tiny_mla)) < 0.6 * cost([LatentRotation(64)] * 4)


def test_matrices_of_zeros_have_axes_too() -> None:
    nothing = latent_sensitivity(torch.zeros(2, 4, 8), torch.zeros(2, 8, 4), torch.zeros(16, 8))
    axes = balanced_axes(torch.zeros(8, 8), nothing)
    assert torch.allclose(axes @ axes.T, torch.eye(8))


@pytest.mark.parametrize("family", ["dense_v2", "moe_v3", "minicpm3"])
def test_any_geometry_gives_a_rotation(family: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(family))
    layer = build(checkpoint.config).layers[-1]
    assert isinstance(layer, DecoderLayer)
    axes = weight_rotation(checkpoint, layer, 32).axes
    assert axes is not None
    assert torch.allclose(axes @ axes.T, torch.eye(len(axes)), atol=1e-5)
