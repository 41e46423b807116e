"""What an exported bundle looks like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.graph_runner import GraphRunner
from support.models import relative_error

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import CheckpointError, MlaError, OutputError, TokenizerError
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.model import empty_cache, forward_window, load_model

FORMATS = ["fp32", "fp16", "fp8", "int8", "int4", "int4-g32", "int3", "int2"]
BYTES = {
    "fp32": 640, "fp16": 320, "fp8": 128 + 36, "int8": 128 + 4 + 36, "int4": 64 + 8 + 36,
    "int4-g32": 64 + 16 + 36, "int3": 48 + 8 + 36, "int2": 32 + 8 + 36,
}  # fmt: skip


def with_recipe(source: Path, folder: Path, **recipe: Any) -> Path:
    """The model with another recipe in its config.json, its weights as they are."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | {"mla_deploy": {"version": 1, **recipe}}
    file.write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def exported(
    request: pytest.FixtureRequest, tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Bundle]:
    root = tmp_path_factory.mktemp(request.param)
    source = with_recipe(tiny_mla, root / "source", cache_format=request.param)
    return source, Bundle.open(export_onnx(source, root / "bundle").bundle, verify=True)


def test_the_checker_accepts_it(exported: tuple[Path, Bundle]) -> None:
    onnx.checker.check_model(exported[1].file("model.onnx"), full_check=False)


def test_it_computes_what_the_reference_does(exported: tuple[Path, Bundle]) -> None:
    """Also where nothing was optimised, so that it does not hang on a fusion."""
    source, bundle = exported
    ids = torch.randint(4096, (100,))
    config = Checkpoint(source).config
    expected = forward_window(load_model(source), config, ids.unsqueeze(0))[0]
    for optimize in (True, False):
        found = GraphRunner(bundle, 1, 100, optimize=optimize).append([ids])[0]
        # A code at a rounding edge may fall either way, and then the step of the format shows.
        assert relative_error(found, expected) < {
            "fp32": 1e-4,
            "fp16": 1e-3,
            "int3": 3e-2,
            "int2": 6e-2,
        }.get(config.recipe.cache_format, 1e-2)


def test_it_writes_the_bytes_the_reference_does(exported: tuple[Path, Bundle]) -> None:
    """The first layer sees equal inputs, so its cache must be equal but for rounding edges."""
    source, bundle = exported
    ids = torch.randint(4096, (100,))
    runner = GraphRunner(bundle, 1, 100)
    runner.append([ids])
    model, config = load_model(source), Checkpoint(source).config
    table = torch.from_numpy(runner.block_table)
    length = torch.tensor([100])
    cache = empty_cache(config, 3)
    cache = model(ids[None], length * 0, length, table, torch.zeros_like(length)[None], cache)[1]
    parts = bundle.manifest.cache.layers[0].parts
    for part, expected in zip(parts, cache[0], strict=True):
        found = torch.from_numpy(runner.cache[f"0.{part.name}"].numpy())
        assert found.dtype is expected.dtype
        if part.dtype in ("uint8", "int8"):
            assert (found != expected).sum() <= max(2, 1e-4 * found.numel())
        else:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_cache_is_as_small_as_promised(exported: tuple[Path, Bundle]) -> None:
    bundle = exported[1]
    layers = bundle.manifest.model.num_hidden_layers
    assert bundle.kv_bytes_per_token == layers * BYTES[bundle.manifest.cache.layers[0].format]
    runner = GraphRunner(bundle, 1, 64)
    bound = sum(value.numpy().nbytes for value in runner.cache.values())
    assert bound == 2 * 64 * bundle.kv_bytes_per_token  # one page, and the scratch page


def test_nodes_have_stable_names(exported: tuple[Path, Bundle]) -> None:
    model = onnx.load(exported[1].file("model.onnx"), load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {f"/model/layers.{i}/self_attn/LatentAttention" for i in range(4)} <= set(names)
    assert "/model/lm_head/MatMul" in names
    attention = next(node for node in model.graph.node if node.op_type == "LatentAttention")
    (function,) = model.functions
    assert (attention.domain, attention.overload) == (function.domain, function.overload)
    assert {attribute.name for attribute in attention.attribute} == set(function.attribute)
    initializers = {tensor.name for tensor in model.graph.initializer}
    assert "model.layers.1.mlp.experts.gate_up_weight" in initializers


def test_a_missing_tensor_stops_it_before_anything_is_written(
    tiny_mla: Path, tmp_path: Path
) -> None:
    source = with_recipe(tiny_mla, tmp_path / "source", gamma_folded=True, experts=None)
    raw = json.loads((source / "config.json").read_text()) | {"n_shared_experts": 2}
    (source / "config.json").write_text(json.dumps(raw))
    expect_failure(source, tmp_path / "bundle", CheckpointError, "wrong shape")


def test_a_tokenizer_is_required(tiny_mla: Path, tmp_path: Path) -> None:
    source = with_recipe(tiny_mla, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    expect_failure(source, tmp_path / "bundle", TokenizerError, "has no tokenizer")


def test_an_existing_folder_is_kept(tiny_mla: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "mine").touch()
    expect_failure(tiny_mla, out, OutputError, "exists already")
    with pytest.raises(OutputError, match="did not write it"):
        export_onnx(tiny_mla, out, force=True)
    assert (out / "mine").exists()
    (out / "manifest.json").touch()
    assert export_onnx(tiny_mla, out, force=True).bundle == out
    assert not (out / "mine").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_the_source_is_not_written_into(tiny_mla: Path) -> None:
    with pytest.raises(OutputError, match="apart from the source"):
        export_onnx(tiny_mla, tiny_mla / "bundle")


def test_a_full_disk_is_reported(
    tiny_mla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mla_deploy.exporters.onnx.export.write_manifest", full)
    expect_failure(tiny_mla, tmp_path / "bundle", OutputError, "cannot be written")


def test_a_disk_too_small_is_known_beforehand(
    tiny_mla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    expect_failure(tiny_mla, tmp_path / "bundle", OutputError, "too full")


def expect_failure(source: Path, out: Path, kind: type[MlaError], message: str) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind, match=message):
        export_onnx(source, out)
    assert sorted(out.parent.iterdir()) == before
