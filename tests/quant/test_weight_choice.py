"""Bits by layer: what is measured is what ships, the budget holds, and bad ones are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.errors import UsageError
from mla_deploy.families import load_config
from mla_deploy.model import forward_window, load_model
from mla_deploy.modules.decoder import Decoder
from mla_deploy.modules.linear import Linear
from mla_deploy.packing import dequantize
from mla_deploy.quant import quantize as quantize_module
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.options import QuantizeOptions, recipe_for
from mla_deploy.quant.quantize import QuantizeReport, quantize_checkpoint
from mla_deploy.quant.weight_choice import WeightChoices
from mla_deploy.quant.weight_loss import Layers, Part, losses
from mla_deploy.quant.weights import quantize_matrix
from mla_deploy.recipe import WEIGHT_BITS_FILE

BUDGET = 5.5


def options(text: Path, **changes: Any) -> QuantizeOptions:
    """Nothing but the matrices of layers is quantised."""
    settings: dict[str, Any] = {
        "kv": "fp32", "weights": "auto", "weights_budget": BUDGET, "calibration": (str(text),),
        "lm_head": "none", "embedding": "none",
    }  # fmt: skip
    return QuantizeOptions(**{**settings, **changes})


@pytest.fixture(scope="module")
def mixed(
    tiny_mla: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizeReport]:
    out = tmp_path_factory.mktemp("mixed") / "out"
    return out, quantize_checkpoint(tiny_mla, out, options(short_text))


def divergence(
    expected: Decoder, found: Decoder, config: MlaConfig, other: MlaConfig, text: CalibrationText
) -> float:
    """Mean KL divergence over the windows, by the whole model at once."""
    gaps = []
    for ids in text.windows:
        window = torch.tensor([ids])
        q = forward_window(expected, config, window)[0].double().log_softmax(-1)
        p = forward_window(found, other, window)[0].double().log_softmax(-1)
        gaps.append((q.exp() * (q - p)).sum(-1))
    return float(torch.cat(gaps).mean())


@torch.no_grad()
def test_the_loss_of_a_part_is_that_of_its_rounded_matrices(
    tiny_mla: Path, short_text: Path
) -> None:
    """Against a model whose matrices are rounded in place."""
    config, model = load_config(tiny_mla), load_model(tiny_mla)
    text = CalibrationText.read([short_text], tiny_mla, config)
    recipe = recipe_for(config, options(short_text, rotate=False))
    checkpoint = Checkpoint(tiny_mla)
    layers = Layers(checkpoint, config, recipe, [None] * 4, None, ("linear", "experts"))
    found = losses(model, config, text, layers)
    parts = {part for part, _ in found}
    assert parts == {Part(0, "linear")} | {
        Part(layer, kind) for layer in (1, 2, 3) for kind in ("linear", "experts")
    }
    rounded = load_model(tiny_mla)
    assert recipe.linear is not None
    noise = energy = 0.0
    for module in rounded.layers[2].modules():
        if isinstance(module, Linear):
            codes = quantize_matrix(module.weight, recipe.linear)
            restored = dequantize(codes.codes, codes.scales, codes.zeros, 4, torch.float32)
            noise += float((restored - module.weight).double().square().sum())
            energy += float(module.weight.double().square().sum())
            module.weight.data = restored
    loss = found[Part(2, "linear"), "int4"]
    assert loss.nmse == pytest.approx(noise / energy, rel=1e-3)
    expected = divergence(load_model(tiny_mla), rounded, config, config, text)
    assert loss.kl == pytest.approx(expected, rel=0.02)
    for part in parts:
        assert found[part, "int8"].kl < found[part, "int4"].kl / 3
        assert found[part, "int8"].nmse < found[part, "int4"].nmse / 50


@torch.no_grad()
def test_what_is_measured_jointly_is_what_ships(
    mixed: tuple[Path, QuantizeReport], tiny_mla: Path, short_text: Path
) -> None:
    out, report = mixed
    assert report.weights is not None
    config = load_config(tiny_mla)
    text = CalibrationText.read([short_text], tiny_mla, config)
    shipped = divergence(load_model(tiny_mla), load_model(out), config, load_config(out), text)
    taken = [
        point.kl
        for point in report.weights.points
        if point.is_measured and point.size == pytest.approx(report.weights.bits_per_weight)
    ]
    assert taken[0] == pytest.approx(shipped, rel=0.02)


def test_the_budget_holds_and_the_recipe_says_the_bits(
    mixed: tuple[Path, QuantizeReport],
) -> None:
    out, report = mixed
    weights = report.weights
    assert weights is not None
    points = {point.name: point for point in weights.points if point.is_measured}
    assert points["int4"].size < weights.bits_per_weight <= BUDGET < points["int8"].size
    assert points["int8"].kl < points["greedy"].kl < points["int4"].kl
    checkpoint = Checkpoint(out)
    bits = {"int4": 4, "int8": 8}
    for item in weights.items:
        own = checkpoint.config.recipe.of_layer(item.layer)
        found = own.linear if item.kind == "linear" else own.experts
        assert found is not None
        assert found.bits == bits[item.choice.format]
    assert len({item.choice.format for item in weights.items}) == 2
    layer_bytes = sum(
        info.bytes
        for name, info in checkpoint.tensors.items()
        if name.startswith("model.layers.")
        and name.rpartition(".")[2] in ("codes", "scales", "zeros")
    )
    assert layer_bytes == sum(item.choice.bytes for item in weights.items)
    raw = json.loads((out / WEIGHT_BITS_FILE).read_text())
    assert raw == json.loads(json.dumps(report.to_json()))["weight_bits"]
    assert WeightChoices.from_json(raw) == weights


def test_a_killed_run_does_not_measure_again(
    mixed: tuple[Path, QuantizeReport],
    tiny_mla: Path,
    short_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(quantize_module._Run, "weights", die)
        with pytest.raises(Killed):
            quantize_checkpoint(tiny_mla, tmp_path / "out", options(short_text))
    assert (tmp_path / "out.partial" / WEIGHT_BITS_FILE).exists()
    monkeypatch.setattr(quantize_module, "choose_weights", die)  # must not be needed
    quantize_checkpoint(tiny_mla, tmp_path / "out", options(short_text))
    for file in mixed[0].iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_a_generous_budget_is_int8_everywhere_and_needs_no_list(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    chosen = options(short_text, weights_budget=16.0, rotate=False, experts="int4", feedback=True)
    report = quantize_checkpoint(tiny_mla, tmp_path / "out", chosen)
    recipe = Checkpoint(tmp_path / "out").config.recipe
    assert recipe.layers == ()
    assert recipe.linear is not None
    assert recipe.experts is not None
    assert (recipe.linear.bits, recipe.experts.bits) == (8, 4)
    assert report.weights is not None
    assert {item.kind for item in report.weights.items} == {"linear"}
    assert recipe == replace(
        recipe_for(load_config(tiny_mla), replace(chosen, weights="int8", weights_budget=None)),
        gamma_folded=True,
    )


def test_a_budget_below_the_minimum_says_the_minimum(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    """Groups of 32 take 4.75 bits a weight: 4 for the code, 16 and 8 for 32 of them."""
    chosen = options(short_text, weights_budget=4.7, group=32)
    with pytest.raises(UsageError, match="budget is below what int4 takes") as error:
        quantize_checkpoint(tiny_mla, tmp_path / "out", chosen)
    assert error.value.allowed == "4.75 bits or more"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_budget": None}, "under a budget"),
        ({"calibration": ()}, "under a budget"),
        ({"weights": "int4"}, "budget is for --weights auto"),
        ({"experts": "auto"}, "experts has a value that is not known"),
        ({"weights_budget": 0.0}, "a number above 0"),
        ({"weights_budget": -5.0}, "a number above 0"),
        ({"weights_budget": math.nan}, "a number above 0"),
        ({"weights_budget": math.inf}, "a number above 0"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(
    changes: dict[str, Any], message: str, short_text: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        options(short_text, **changes)
