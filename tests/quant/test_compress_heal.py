"""Healing: it must mend, go on after a kill, and write what it learnt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import VOCAB, relative_error, save_checkpoint
from support.sources import byte_tokenizer, random_source, random_text

from mla_deploy.errors import UsageError
from mla_deploy.families import load_config
from mla_deploy.model import forward_window, load_model
from mla_deploy.quant.compress.calibration import generate
from mla_deploy.quant.compress.convert import convert_checkpoint
from mla_deploy.quant.compress.heal import HealPlan, distil, match_layer
from mla_deploy.quant.compress.latent import softmax_scale
from mla_deploy.quant.compress.layer import LatentWeights, load_layer
from mla_deploy.quant.compress.options import ConvertOptions
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.compress.streams import SourceLayer

RANK, ROPE, HEADS, GROUPS, D = 24, 8, 8, 4, 16


def source_folder(folder: Path, family: str = "llama") -> Path:
    source = save_checkpoint(random_source(family), folder / "source", None)
    byte_tokenizer(source)
    return source


def poor_latent(source: Source, layer: int) -> LatentWeights:
    """An attention that has everything still to learn."""
    width = GROUPS * D
    return LatentWeights(
        inv_freq=source.config.inverse_frequencies(layer)[: ROPE // 2],
        rope_q=torch.randn(HEADS, ROPE, D) / 4,
        rope_k=torch.randn(ROPE, width) / 8,
        down_k=torch.randn(RANK, width) / 8,
        down_v=torch.randn(RANK, width) / 8,
        latent_bias=torch.zeros(RANK),
        w_uk=torch.randn(HEADS, D, RANK) / 5,
        w_uv=torch.randn(HEADS, RANK, D) / 5,
        o_weight=load_layer(source, layer)["self_attn.o_proj.weight"],
        o_bias=torch.zeros(96),
        softmax_scale=softmax_scale(source.config),
    )


def plan_for(source: Source, **changes: Any) -> HealPlan:
    windows = generate(source, 12, 32, seed=1)
    settings = {"match_tokens": 5120, "distil_tokens": 2560, "seed": 0, "batch_tokens": 128}
    return HealPlan(windows=windows, **{**settings, **changes})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_learns_the_attention_of_its_source(tmp_path: Path, family: str) -> None:
    source = Source(source_folder(tmp_path, family))
    layer = SourceLayer(source.config, 0, load_layer(source, 0))
    plan = plan_for(source)
    inputs = source.read("model.embed_tokens.weight")[plan.windows]
    latent = poor_latent(source, 0)
    healed, curve = match_layer(layer, inputs, latent, plan)
    qkv = layer.project(inputs)
    target = layer.attend(*qkv)

    def error(of: LatentWeights) -> float:
        return float((of.attend(*qkv) - target).square().sum() / target.square().sum())

    assert error(healed) < 0.7 * error(latent)
    assert len(curve.loss) == 40
    assert curve.tokens[-1] == 5120
    assert not any(x.requires_grad for x in healed.tensors().values())


def test_distillation_lowers_its_loss_and_trains_what_it_should(tmp_path: Path) -> None:
    source = Source(source_folder(tmp_path))
    latents = [poor_latent(source, layer) for layer in range(2)]
    students, curve = distil(source, latents, plan_for(source), tmp_path / "state")
    assert sum(curve.loss[-4:]) < sum(curve.loss[:4])
    for student, latent in zip(students, latents, strict=True):
        before = latent.tensors()
        changed = {n for n, x in student.latent.tensors().items() if not torch.equal(x, before[n])}
        assert changed == set(before) - {"inv_freq"}


def test_an_interrupted_distillation_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    source = Source(source_folder(tmp_path))
    latents = [poor_latent(source, layer) for layer in range(2)]
    plan = plan_for(source, save_every=4)
    whole, curve = distil(source, latents, plan, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(source, latents, plan, tmp_path / "state", stop)
    seen: list[int] = []
    resumed, again = distil(
        source, latents, plan, tmp_path / "state", lambda done, total: seen.append(done)
    )
    assert seen[0] == 9  # from the state after step 8
    assert again.loss == pytest.approx(curve.loss, rel=1e-5)
    for one, other in zip(whole, resumed, strict=True):
        for name, value in one.tensors().items():
            torch.testing.assert_close(other.tensors()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_healed_checkpoint_is_better_and_holds_what_was_measured(
    tmp_path: Path, family: str
) -> None:
    source = source_folder(tmp_path, family)
    text = str(random_text(tmp_path))
    options = ConvertOptions(
        kv_lora_rank=RANK,
        qk_rope_head_dim=ROPE,
        calibration=(text,),
        tokens=2048,
        window=64,
        heal=(text,),
        heal_tokens=20_000,
        precision="fp32",
    )
    healed = convert_checkpoint(source, tmp_path / "healed", options)
    plain = convert_checkpoint(
        source,
        tmp_path / "plain",
        dataclasses.replace(options, heal=(), heal_tokens=None, precision=None),
    )
    assert healed.held_out is not None
    assert plain.held_out is not None
    # The source knows nothing of the text, so learning it takes the healed model away from it.
    assert healed.held_out.converted_loss < plain.held_out.converted_loss
    errors = [sum(layer.output_error for layer in one.layers) for one in (healed, plain)]
    assert errors[0] < errors[1]
    assert healed.distillation is not None
    page = (tmp_path / "healed" / "report.html").read_text()
    assert page.count("<svg") == 4
    leftovers = {"streams", "student", "distillation", "layers", "geometry", "job"}
    assert not any(f.name.split("-")[0].split(".")[0] in leftovers for f in healed_files(tmp_path))
    logits = {
        name: forward_window(
            load_model(tmp_path / name),
            load_config(tmp_path / name),
            torch.arange(2, 60).unsqueeze(0) % VOCAB,
        )
        for name in ("healed", "plain")
    }
    assert relative_error(logits["healed"], logits["plain"]) > 1e-3


def healed_files(folder: Path) -> list[Path]:
    return list((folder / "healed").iterdir())


def test_bf16_heals_too(tmp_path: Path) -> None:
    source = Source(source_folder(tmp_path))
    latents = [poor_latent(source, layer) for layer in range(2)]
    plan = plan_for(source, precision="bf16")
    _, curve = distil(source, latents, plan, tmp_path / "state")
    assert sum(curve.loss[-4:]) < sum(curve.loss[:4])


def test_healing_options_need_text_and_a_device_that_is_there(tmp_path: Path) -> None:
    common: dict[str, Any] = {"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE}
    common |= {"calibration": ("self",), "tokens": 640, "window": 64}
    with pytest.raises(UsageError, match="without text to heal on"):
        ConvertOptions(**common, heal_tokens=100)
    source = source_folder(tmp_path)
    text = str(random_text(tmp_path))
    with pytest.raises(UsageError, match="device nowhere"):
        convert_checkpoint(
            source, tmp_path / "out", ConvertOptions(**common, heal=(text,), device="nowhere")
        )
