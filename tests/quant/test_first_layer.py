"""The first layer's cache: int8 where the others are int4, unless something else is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import random_model, relative_error, save_checkpoint

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import ConfigError, UsageError
from mla_deploy.families import load_config
from mla_deploy.model import forward_window, load_model
from mla_deploy.quant.calibrate import calibrate
from mla_deploy.quant.calibration_text import CalibrationText
from mla_deploy.quant.options import QuantizeOptions, recipe_for
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.quant.window_run import WindowRun, rotated
from mla_deploy.recipe import Recipe


def recipe_of(model: Path, **changes: Any) -> Recipe:
    return recipe_for(load_config(model), QuantizeOptions(**changes))


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    return forward_window(load_model(path), Checkpoint(path).config, ids.unsqueeze(0))[0]


def text_ids(model: Path, text: Path) -> torch.Tensor:
    return torch.tensor(CalibrationText.read([text], model, load_config(model)).windows[0])


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("changes", [{}, {"kv": "int4"}, {"weights": "none"}], ids=str)
def test_an_int4_cache_has_int8_in_the_first_layer(tiny_mla: Path, changes: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_mla, **changes)
    assert recipe.cache_formats(4) == ("int8", "int4", "int4", "int4")
    assert recipe.cache_format == "int4"
    for layer in recipe.layers:
        assert (layer.latent_rotation, layer.balanced) == (64, True)
        assert (layer.linear, layer.experts) == (recipe.linear, recipe.experts)


def test_so_has_the_finer_record_of_4_bits(tiny_mla: Path) -> None:
    formats = recipe_of(tiny_mla, kv="int4-g32").cache_formats(4)
    assert formats == ("int8", *["int4-g32"] * 3)
    assert recipe_of(tiny_mla, kv="int4-g32", kv_first="int4-g32").layers == ()


@pytest.mark.parametrize("kv", ["int2", "int3", "int8", "fp8", "fp16", "fp32"])
def test_other_caches_are_the_same_in_every_layer(tiny_mla: Path, kv: str) -> None:
    recipe = recipe_of(tiny_mla, kv=kv)
    assert (recipe.cache_format, recipe.layers) == (kv, ())


def test_the_first_layer_is_what_is_asked_for(tiny_mla: Path) -> None:
    assert recipe_of(tiny_mla, kv_first="int4").layers == ()
    assert recipe_of(tiny_mla, kv_first="fp16").cache_formats(4) == ("fp16", *["int4"] * 3)
    assert recipe_of(tiny_mla, kv="int3", kv_first="int8").cache_formats(4) == (
        "int8", *["int3"] * 3,
    )  # fmt: skip


def test_a_model_of_one_layer_keeps_int4(tiny_mla: Path) -> None:
    config = replace(load_config(tiny_mla), num_hidden_layers=1)
    for first, expected in ((None, "int4"), ("int8", "int8")):
        recipe = recipe_for(config, QuantizeOptions(kv_first=first))
        assert (recipe.cache_format, recipe.layers) == (expected, ())


def test_each_layer_is_rotated_as_its_own_record_wants(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(kv="fp32", kv_first="int8", weights="none")
    recipe = quantize_checkpoint(tiny_mla, tmp_path / "out", options).recipe
    assert [layer.latent_rotation for layer in recipe.layers] == [64, None, None, None]
    ids = text_ids(tiny_mla, short_text)
    found, expected = logits(tmp_path / "out", ids), logits(tiny_mla, ids)
    assert 1e-7 < float(divergence(expected, found).median()) < 1e-4


def test_the_default_is_nearer_to_the_model_than_int4_in_every_layer(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    ids = text_ids(tiny_mla, short_text)
    expected = logits(tiny_mla, ids)
    kl = {}
    for first in (None, "int4"):
        options = QuantizeOptions(weights="none", kv_first=first)
        quantize_checkpoint(tiny_mla, tmp_path / str(first), options)
        kl[first] = float(divergence(expected, logits(tmp_path / str(first), ids)).median())
    assert kl[None] < 0.8 * kl["int4"]


def test_a_calibration_measures_each_layer_with_its_own_record(
    tiny_mla: Path, short_text: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(weights="none", calibration=(str(short_text),))
    report = quantize_checkpoint(tiny_mla, tmp_path / "out", options)
    formats = ("int8", "int4", "int4", "int4")
    cache = report.cache
    assert cache is not None
    assert tuple(choice.format for choice in cache.chosen) == formats
    assert report.recipe.cache_formats(4) == formats
    assert cache.bytes_per_layer == (168 + 3 * 108) / 4
    config = load_config(tiny_mla)
    text = CalibrationText.read([short_text], tiny_mla, config)
    for layer, name in ((0, "int8"), (1, "int4")):
        alone, _ = calibrate(load_model(tiny_mla), config, text, [(name,)] * 4, measures_kl=False)
        assert cache.chosen[layer].output_error == pytest.approx(
            alone.layers[layer][0].output_error, rel=1e-3
        )
        assert cache.chosen[layer].rotation == alone.layers[layer][0].rotation

    # And what is written is what was decided on.
    run = WindowRun(load_model(tiny_mla), config, text.windows[0])
    state: Any = run.start
    with torch.no_grad():
        for layer, (name, rotation) in enumerate(zip(formats, cache.rotations, strict=True)):
            with rotated(run.attention(layer), rotation):
                state = run.layer(layer, *state, name)
        expected = run.log_probabilities(*state)
    found = logits(tmp_path / "out", torch.tensor(text.windows[0]))
    assert float(divergence(expected, found).median()) < 1e-4


def test_a_record_that_nobody_knows(tiny_mla: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown cache format") as error:
        quantize_checkpoint(tiny_mla, tmp_path / "out", QuantizeOptions(kv_first="int5"))
    assert error.value.found == "int5"
    assert "int8" in str(error.value.allowed)
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_hold_the_latent(tmp_path: Path) -> None:
    model = random_model("deepseek_v2", moe=False, yarn=False, q_lora=False, kv_lora_rank=40)
    source = save_checkpoint(model, tmp_path / "source", None)
    assert recipe_of(source, weights="none").cache_formats(2) == ("int8", "int4")
    with pytest.raises(ConfigError, match="int3"):
        recipe_of(source, weights="none", kv_first="int3")


def test_auto_chooses_the_first_layer_too() -> None:
    with pytest.raises(UsageError, match="like that of the others") as error:
        QuantizeOptions(kv="auto", kv_budget=100.0, kv_first="int8", calibration=("text",))
    assert error.value.found == "--kv auto --kv-first int8"
    assert error.value.hint


def test_logits_of_a_random_model_stay_near(dense_v2: Path, tmp_path: Path) -> None:
    """Two layers, one of each record, folded differently from a recipe of one record."""
    quantize_checkpoint(dense_v2, tmp_path / "out", QuantizeOptions(weights="none"))
    ids = torch.randint(0, 192, (60,))
    assert 1e-3 < relative_error(logits(tmp_path / "out", ids), logits(dense_v2, ids)) < 0.2
