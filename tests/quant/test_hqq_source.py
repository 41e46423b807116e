"""Checkpoints that the hqq package quantised, against the package itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import random_model, relative_error, save_checkpoint, transformers_logits

from mla_deploy.checkpoint import SINGLE_FILE, Checkpoint
from mla_deploy.errors import CheckpointError, UsageError
from mla_deploy.model import forward_window, load_model
from mla_deploy.packing import dequantize
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint

hqq = pytest.importorskip("hqq.core.quantize")

SIZES = {"hidden_size": 128, "intermediate_size": 192, "v_head_dim": 32, "qk_nope_head_dim": 32}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def hqq_checkpoint(folder: Path, bits: int = 4, group: int = 64, axis: int = 1) -> tuple[Path, Any]:
    """As transformers' HqqConfig saves it, and the model with the weights that it stands for."""
    model = random_model("deepseek_v2", moe=False, yarn=False, q_lora=False, **SIZES)
    save_checkpoint(model, folder, None)
    tensors = load_file(folder / SINGLE_FILE)
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        quantized = hqq.HQQLinear(
            linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False
        )
        linear.weight.data = quantized.dequantize().clone()
        del tensors[f"{name}.weight"]
        quantized.encoded_state_dict = True
        for part, value in quantized.state_dict().items():
            tensors[f"{name}.{part}"] = value.contiguous()
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] = {
        "quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits}},
        "skip_modules": ["lm_head"],
    }  # fmt: skip
    file.write_text(json.dumps(raw))
    return folder, model


def plain(**changes: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"kv": "fp32", "lm_head": "none", "embedding": "none", **changes})


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 32), (8, 64)])
def test_the_codes_are_kept_and_mean_what_they_meant(bits: int, group: int, tmp_path: Path) -> None:
    source, model = hqq_checkpoint(tmp_path / "source", bits, group)
    options = plain(weights=f"int{bits}")
    report = quantize_checkpoint(source, tmp_path / "out", options)
    linear = report.recipe.linear
    assert linear is not None
    assert (linear.bits, linear.group, linear.zeros) == (bits, group, "exact")
    assert report.kinds["linear"].nmse == 0
    made = Checkpoint(tmp_path / "out")
    parts = [made.read(f"{Q_PROJ}.{part}") for part in ("codes", "scales", "zeros")]
    expected = model.get_submodule(Q_PROJ).weight
    assert relative_error(dequantize(*parts, bits, torch.float32), expected) < 2e-3
    ids = torch.randint(0, 192, (50,))
    found = forward_window(load_model(made.path), made.config, ids.unsqueeze(0))[0]
    assert relative_error(found, transformers_logits(model, ids)) < 2e-2
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())


def test_another_format_is_made_from_what_the_codes_stand_for(tmp_path: Path) -> None:
    source, model = hqq_checkpoint(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "out", plain(weights="none"))
    ids = torch.randint(0, 192, (50,))
    config = Checkpoint(tmp_path / "out").config
    found = forward_window(load_model(tmp_path / "out"), config, ids.unsqueeze(0))[0]
    assert relative_error(found, transformers_logits(model, ids)) < 1e-4


def test_it_is_read_by_quantize_only(tmp_path: Path) -> None:
    source, _ = hqq_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match="another tool quantised"):
        Checkpoint(source)
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    with pytest.raises(UsageError, match="cannot be calibrated"):
        quantize_checkpoint(source, tmp_path / "out", plain(calibration=(str(text),)))


def test_groups_along_the_other_axis_are_refused(tmp_path: Path) -> None:
    source, _ = hqq_checkpoint(tmp_path / "source", axis=0)
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        quantize_checkpoint(source, tmp_path / "out", plain())
    assert "axis 0" in str(error.value.found)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("shape", torch.tensor([10**9, 10**9])),
        ("shape", torch.tensor([-1, 128])),
        ("nbits", torch.tensor(3)),
        ("packing", torch.tensor([1], dtype=torch.uint8)),
        ("group_size", torch.tensor(0)),
        ("scale", torch.zeros(4, 1)),
        ("zero", None),
        ("W_q", torch.zeros(3, 64, dtype=torch.uint8)),
    ],
)
def test_a_damaged_matrix_is_refused(part: str, value: torch.Tensor | None, tmp_path: Path) -> None:
    source, _ = hqq_checkpoint(tmp_path / "source")
    tensors = load_file(source / SINGLE_FILE)
    if value is None:
        del tensors[f"{Q_PROJ}.{part}"]
    else:
        tensors[f"{Q_PROJ}.{part}"] = value
    save_file(tensors, source / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="q_proj cannot be read"):
        quantize_checkpoint(source, tmp_path / "out", plain())
    assert not (tmp_path / "out").exists()


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source, _ = hqq_checkpoint(tmp_path / "source")
    tensors = load_file(source / SINGLE_FILE)
    tensors[f"{Q_PROJ}.scale"][3] = float("nan")
    save_file(tensors, source / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="not usable"):
        quantize_checkpoint(source, tmp_path / "out", plain())


def test_pickles_are_refused(tmp_path: Path) -> None:
    source, _ = hqq_checkpoint(tmp_path / "source")
    (source / SINGLE_FILE).rename(source / "qmodel.pt")
    with pytest.raises(CheckpointError, match="no weights") as error:
        quantize_checkpoint(source, tmp_path / "out", plain())
    assert "never loaded" in str(error.value.found)
