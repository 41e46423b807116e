"""Converting a checkpoint: sizes, layouts, resuming, bad input, and what comes after."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.graph_runner import GraphRunner
from support.models import VOCAB, relative_error, save_checkpoint, transformers_logits
from support.sources import byte_tokenizer, random_source, random_text

import mla_deploy.quant.compress.convert as convert_module
from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import CheckpointError, ConfigError, OutputError, TokenizerError, UsageError
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.families import load_config
from mla_deploy.model import build, forward_window, load_model
from mla_deploy.modules.base import checkpoint_shapes
from mla_deploy.quant.compress.convert import convert_checkpoint
from mla_deploy.quant.compress.estimate import estimate
from mla_deploy.quant.compress.methods import METHODS
from mla_deploy.quant.compress.options import ConvertOptions
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint

CACHED = 2 * 4 * 16
SMALL = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}


def source_folder(folder: Path, family: str = "llama", **changes: Any) -> tuple[Any, Path]:
    theirs = random_source(family, **changes)
    source = save_checkpoint(theirs, folder / "source", None)
    byte_tokenizer(source)
    return theirs, source


def options(text: Path, **changes: Any) -> ConvertOptions:
    size = {} if {"target_ratio", "like_paper"} & set(changes) else SMALL
    return ConvertOptions(
        **{"calibration": (str(text),), "tokens": 2048, "window": 64, **size, **changes}
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("method", METHODS[::2])
def test_every_method_gives_a_whole_checkpoint(tmp_path: Path, method: str) -> None:
    _, source = source_folder(tmp_path)
    report = convert_checkpoint(
        source, tmp_path / "out", options(random_text(tmp_path), method=method)
    )
    checkpoint = Checkpoint(tmp_path / "out")
    assert set(checkpoint.tensors) == set(checkpoint_shapes(build(checkpoint.config)))
    checkpoint.check(checkpoint_shapes(build(checkpoint.config)))
    assert report.geometry.ratio(report.source) == 32 / CACHED
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["held_out"]["converted_loss"] == report.held_out.converted_loss  # type: ignore[union-attr]
    assert [layer["layer"] for layer in written["layers"]] == [0, 1]


def test_a_broken_tokenizer_stops_it_before_any_work(tmp_path: Path) -> None:
    _, source = source_folder(tmp_path)
    (source / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(TokenizerError, match="chat template"):
        convert_checkpoint(source, tmp_path / "out", options(random_text(tmp_path)))
    assert not list(tmp_path.glob("out*"))


def test_the_reported_loss_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """What streamed through the layers is what the reference computes."""
    from mla_deploy.quant.compress.convert import calibration_windows
    from mla_deploy.quant.compress.source import Source

    theirs, source = source_folder(tmp_path, "qwen3")
    chosen = options(random_text(tmp_path))
    report = convert_checkpoint(source, tmp_path / "out", chosen)
    windows = calibration_windows(Source(source), chosen)
    assert windows is not None
    assert report.held_out is not None
    ids = windows.held_out
    logits = forward_window(load_model(tmp_path / "out"), load_config(tmp_path / "out"), ids)
    expected = torch.stack([transformers_logits(theirs, one) for one in ids])

    def loss(values: torch.Tensor) -> float:
        chosen = values[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2))
        return -float(chosen.mean())

    assert report.held_out.converted_loss == pytest.approx(loss(logits), rel=1e-4)
    assert report.held_out.loss == pytest.approx(loss(expected), rel=1e-4)


def test_ours_is_closer_than_the_published_methods(tmp_path: Path) -> None:
    _, source = source_folder(tmp_path)
    text = random_text(tmp_path)
    kl = {}
    for method in ("query-aware", "mha2mla-2norm-joint", "transmla"):
        report = convert_checkpoint(source, tmp_path / method, options(text, method=method))
        assert report.held_out is not None
        kl[method] = report.held_out.kl
    assert kl["query-aware"] < min(kl["mha2mla-2norm-joint"], kl["transmla"])


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [({"target_ratio": 0.5}, 0.5), ({"like_paper": 64}, 0.3125), ({"like_paper": 16}, 0.125)],
)
def test_sizes_are_met_and_not_exceeded(
    tmp_path: Path, changes: dict[str, Any], ratio: float
) -> None:
    _, source = source_folder(tmp_path)
    report = convert_checkpoint(source, tmp_path / "out", options(random_text(tmp_path), **changes))
    found = report.geometry.ratio(report.source)
    assert ratio - 8 / CACHED < found <= ratio


@pytest.mark.parametrize("groups", [4, 8], ids=["gqa", "mha"])
def test_the_stock_layout_gives_the_same_logits_in_transformers(
    tmp_path: Path, groups: int
) -> None:
    from transformers import DeepseekV3ForCausalLM

    _, source = source_folder(tmp_path, num_key_value_heads=groups)
    chosen = options(random_text(tmp_path), qk_rope_head_dim=16, layout="deepseek_v3")
    report = convert_checkpoint(source, tmp_path / "out", chosen)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(VOCAB, (1, 100))
    found = forward_window(load_model(tmp_path / "out"), load_config(tmp_path / "out"), ids)[0]
    assert relative_error(found, transformers_logits(theirs, ids[0])) < 1e-4
    # The norm on the latent costs nothing that could be seen: the loss is what streamed through
    # layers without it.
    from mla_deploy.quant.compress.convert import calibration_windows
    from mla_deploy.quant.compress.source import Source

    windows = calibration_windows(Source(source), chosen)
    assert windows is not None
    assert report.held_out is not None
    logits = torch.stack([transformers_logits(theirs, one) for one in windows.held_out])
    loss = -logits[:, :-1].log_softmax(-1).gather(2, windows.held_out[:, 1:].unsqueeze(2)).mean()
    assert float(loss) == pytest.approx(report.held_out.converted_loss, abs=2e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_converted_model_is_quantised_and_exported_as_any_other(
    tmp_path: Path, family: str
) -> None:
    _, source = source_folder(tmp_path, family, hidden_size=128)
    size = {"kv_lora_rank": 64, "qk_rope_head_dim": 16}
    whole, small = tmp_path / "mla", tmp_path / "int8"
    convert_checkpoint(source, whole, options(random_text(tmp_path), **size))
    quantize_checkpoint(whole, small, QuantizeOptions(weights="none", kv="int8"))
    bundle = Bundle.open(export_onnx(small, tmp_path / "bundle").bundle)
    ids = torch.randint(VOCAB, (80,))
    found = GraphRunner(bundle, 1, 80).append([ids])[0]
    expected = forward_window(load_model(small), load_config(small), ids.unsqueeze(0))[0]
    # A latent on the edge between two codes may fall to either side.
    assert relative_error(found, expected) < 0.05
    # The latent is rotated before it is rounded: one that is rotated in part is another latent.
    exact = forward_window(load_model(whole), load_config(whole), ids.unsqueeze(0))[0]
    assert 1e-4 < relative_error(expected, exact) < 0.2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_calibration_of_a_converted_model_changes_nothing_before_rounding(
    tmp_path: Path, family: str
) -> None:
    _, source = source_folder(tmp_path, family, hidden_size=128)
    size = {"kv_lora_rank": 64, "qk_rope_head_dim": 16}
    whole, small = tmp_path / "mla", tmp_path / "fp32"
    text = str(random_text(tmp_path))
    convert_checkpoint(source, whole, options(Path(text), **size))
    chosen = QuantizeOptions(weights="none", kv="fp32", calibration=(text,), rotate=True)
    quantize_checkpoint(whole, small, chosen)
    assert load_config(small).recipe.of_layer(0).latent_rotation == 64
    ids = torch.randint(VOCAB, (1, 60))
    found, expected = (
        forward_window(load_model(folder), load_config(folder), ids)[0] for folder in (small, whole)
    )
    assert relative_error(found, expected) < 1e-4


def test_int4_weights_reach_every_matrix_of_a_converted_model(tmp_path: Path) -> None:
    _, source = source_folder(
        tmp_path, "qwen3", hidden_size=128, intermediate_size=192, head_dim=16
    )
    size = {"kv_lora_rank": 64, "qk_rope_head_dim": 16}
    convert_checkpoint(source, tmp_path / "mla", options(random_text(tmp_path), **size))
    quantize_checkpoint(tmp_path / "mla", tmp_path / "int4", QuantizeOptions())
    export_onnx(tmp_path / "int4", tmp_path / "bundle")
    names = Checkpoint(tmp_path / "int4").tensors
    assert "model.layers.0.self_attn.k_latent_proj.codes" in names
    assert "model.layers.0.self_attn.q_proj.codes" in names


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    _, source = source_folder(tmp_path)
    found = []
    for name in ("a", "b"):
        convert_checkpoint(
            source, tmp_path / name, options(tmp_path, calibration=("self",), seed=5)
        )
        found.append(weights_of(tmp_path / name))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


KILLED = """
import os, signal, sys
from mla_deploy.quant.compress import convert
from mla_deploy.quant.compress.options import ConvertOptions

def progress(done, total, what):
    if what == "layer 0":
        os.kill(os.getpid(), signal.SIGKILL)

convert.convert_checkpoint(sys.argv[1], sys.argv[2], ConvertOptions(
    target_ratio=0.5, calibration=(sys.argv[3],), tokens=2048, window=64), progress)
"""


@contextmanager
def edited(file: Path, is_edited: bool) -> Iterator[None]:
    """A file that means the same and is another, if it is edited."""
    before = file.read_text()
    if is_edited:
        file.write_text(before + "\n")
    yield
    file.write_text(before)


def test_a_killed_run_goes_on_with_the_next_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = source_folder(tmp_path)
    text, out = random_text(tmp_path), tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(out), str(text)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    chosen = options(text, target_ratio=0.5)
    for what, change in (
        ("--target-ratio 0.5, not 0.25", options(text, target_ratio=0.25)),
        ("tokenizer.json changed", chosen),
    ):
        with edited(source / "tokenizer.json", "tokenizer" in what):
            with pytest.raises(OutputError, match="another command") as refused:
                convert_checkpoint(source, out, change)
            assert refused.value.found == what
    assert (tmp_path / "out.partial").exists()
    monkeypatch.chdir(tmp_path)  # the same files, spelled otherwise
    resumed = convert_checkpoint(source.name, out.name, options(Path(text.name), target_ratio=0.5))
    assert resumed.resumed_layers == 1
    whole = convert_checkpoint(source, tmp_path / "whole", chosen)
    assert whole.resumed_layers == 0
    first, second = weights_of(out), weights_of(tmp_path / "whole")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in second)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_a_run_that_fails_before_it_has_done_anything_leaves_nothing(tmp_path: Path) -> None:
    theirs, source = source_folder(tmp_path)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[3, 5] = float("nan")
    save_checkpoint(theirs, source, None)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "out", options(random_text(tmp_path)))
    assert "model.embed_tokens.weight" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "text.txt"}


@pytest.mark.parametrize("at", ["layer 1", "write_page", "publish"])
def test_a_run_that_fails_keeps_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """In the second layer, after the last one, and when something came to the output meanwhile."""
    _, source = source_folder(tmp_path)
    chosen, out, said = options(random_text(tmp_path)), tmp_path / "out", []

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    def progress(done: int, total: int, what: str) -> None:
        if at == what:
            fail()
        if at == "publish" and what == "comparison":
            out.mkdir()
            (out / "precious.txt").write_text("mine")

    with monkeypatch.context() as patch:
        if at == "write_page":
            patch.setattr(convert_module, "write_page", fail)
        with pytest.raises(OutputError if at == "publish" else RuntimeError):
            convert_checkpoint(source, out, chosen, progress, say=said.append)
    assert f"kept in {out}.partial" in said[-1]
    if at == "publish":
        assert (out / "precious.txt").read_text() == "mine"
        out.rename(tmp_path / "mine")
    assert convert_checkpoint(source, out, chosen).resumed_layers == 2
    convert_checkpoint(source, tmp_path / "whole", chosen)
    first, second = weights_of(out), weights_of(tmp_path / "whole")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in second)
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


def test_a_resumed_run_needs_room_for_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = source_folder(tmp_path)
    chosen = options(random_text(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_page", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_checkpoint(source, tmp_path / "out", chosen)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    assert usage.free < sum(file.stat().st_size for file in source.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="too full"):
        convert_checkpoint(source, tmp_path / "other", chosen)
    assert convert_checkpoint(source, tmp_path / "out", chosen).resumed_layers == 2


def test_a_layer_that_overflows_is_named(tmp_path: Path) -> None:
    theirs, source = source_folder(tmp_path)
    with torch.no_grad():
        theirs.model.layers[1].mlp.down_proj.weight.fill_(1e38)
    save_checkpoint(theirs, source, None)
    with pytest.raises(CheckpointError, match="the layer 1 of the source"):
        convert_checkpoint(source, tmp_path / "out", options(random_text(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 121, "qk_rope_head_dim": 8}, "1 to 120 beside 8"),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 7}, "multiples of 2"),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 66}, "up to 64"),
        ({"method": "mha2mla-2norm-joint", "qk_rope_head_dim": 12}, "multiples of 8"),
        ({"layout": "deepseek_v3", "qk_rope_head_dim": 12}, "what divides it"),
        ({"window": 512}, "16 to 256"),
        ({"target_ratio": 0.01}, "too small"),
    ],
)
def test_sizes_that_do_not_fit_say_what_does(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    _, source = source_folder(tmp_path)
    with pytest.raises(UsageError) as caught:
        convert_checkpoint(source, tmp_path / "out", options(random_text(tmp_path), **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    _, source = source_folder(tmp_path)
    with pytest.raises(UsageError) as caught:
        convert_checkpoint(source, tmp_path / "out", options(random_text(tmp_path, words=20)))
    assert "640 tokens or more" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {}, "biases on the queries"),
        ("qwen3", {}, "norms on queries and keys"),
        ("llama", {"rope": "llama3"}, "rope scaling"),
    ],
)
def test_the_stock_layout_refuses_what_it_cannot_hold(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    _, source = source_folder(tmp_path, family, **changes)
    chosen = options(random_text(tmp_path), layout="deepseek_v3", qk_rope_head_dim=16)
    with pytest.raises(ConfigError) as caught:
        convert_checkpoint(source, tmp_path / "out", chosen)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": None}, "in one way"),
        ({"target_ratio": 0.5, "kv_lora_rank": 24}, "in one way"),
        ({"qk_rope_head_dim": None}, "needs --qk-rope-head-dim"),
        ({"target_ratio": 1.5}, "above 0, up to 1"),
        ({"method": "svd"}, "query-aware, mha2mla"),
        ({"layout": "llama"}, "mla_deploy, deepseek_v3"),
        ({"calibration": ()}, "what to calibrate on"),
        ({"no_calibration": True}, "what to calibrate on"),
        ({"calibration": ("self", "a.txt")}, "cannot be mixed"),
        ({"calibration": (), "no_calibration": True, "method": "transmla"}, "needs calibration"),
        ({"tokens": 0}, "tokens is out of range"),
        (
            {"calibration": (), "no_calibration": True, "seed": 3},
            "--no-calibration --tokens 2048 --window 64 --seed 3",
        ),
        (
            {"calibration": (), "no_calibration": True, "heal": ("a.txt",), "seed": 3},
            "--no-calibration --tokens 2048\n",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        options(tmp_path / "a.txt", **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inv_freq": [[1.0]]}, "1 rows"),
        ({"inv_freq": None}, "not a table"),
        ({"q_lora_rank": 16}, "no q_lora_rank"),
    ],
)
def test_a_config_that_is_not_whole_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, source = source_folder(tmp_path)
    convert_checkpoint(source, tmp_path / "out", options(random_text(tmp_path)))
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert message in str(caught.value)


def test_an_estimate_reads_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    _, source = source_folder(tmp_path)
    found = estimate(source, options(tmp_path / "absent.txt", target_ratio=0.5))
    assert [(size.kv_lora_rank, size.qk_rope_head_dim) for size in found.sizes] == [
        (48, 16),
        (32, 32),
    ]
    assert found.seconds > 0
    assert found.memory_bytes > 0
    assert {p.name for p in tmp_path.iterdir()} == {"source"}
