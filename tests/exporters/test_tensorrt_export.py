"""Bundles for TensorRT: engines built with no GPU, and what stops a build."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from pydantic import ValidationError
from support.models import random_model, save_checkpoint

from mla_deploy.bundle import Bundle
from mla_deploy.cache import cache_record
from mla_deploy.errors import BundleError, ConfigError, MlaError, OutputError, UsageError
from mla_deploy.exporters.tensorrt import build, export
from mla_deploy.exporters.tensorrt import worker as worker_module
from mla_deploy.exporters.tensorrt.build import BuildError
from mla_deploy.exporters.tensorrt.capability import capability, compute_capability
from mla_deploy.exporters.tensorrt.export import TensorRtOptions, export_tensorrt
from mla_deploy.families import load_config
from mla_deploy.quant.quantize import QuantizeOptions, quantize_checkpoint
from mla_deploy.recipe import LayerRecipe
from mla_deploy.runtime.tensorrt_device import check_version, engine_for

SM89 = TensorRtOptions(targets=("sm89",), max_tokens=256, prefill_chunk=32)
ONNX = TensorRtOptions(onnx_only=True, compat="rtx1.7", max_tokens=256, prefill_chunk=32)


@pytest.fixture(scope="module")
def source(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense layer, quantised."""
    folder = tmp_path_factory.mktemp("source")
    model = random_model(
        "deepseek_v2", moe=False, yarn=False, q_lora=False, num_hidden_layers=1, v_head_dim=24
    )
    save_checkpoint(model, folder / "float", tiny_mla)
    quantize_checkpoint(folder / "float", folder / "int4", QuantizeOptions(group=32))
    return folder / "int4"


@pytest.fixture(scope="module")
def graph(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the graph alone."""
    return export_tensorrt(source, tmp_path_factory.mktemp("graph") / "bundle", ONNX).bundle


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the process that builds by a line of Python."""

    def use(code: str) -> None:
        monkeypatch.setattr(build, "worker_command", lambda: [sys.executable, "-c", code])
        monkeypatch.setattr(export, "check_backend", lambda *_: None)

    return use


def test_the_manifest_has_the_cache_of_each_layer(source: Path) -> None:
    config = load_config(source)
    own = LayerRecipe("int4", 32, False, config.recipe.linear, None)
    layers = (own, replace(own, cache_format="int8"))
    mixed = replace(config, num_hidden_layers=2, recipe=replace(config.recipe, layers=layers))
    found = export.cache_info(mixed).layers
    assert [layer.format for layer in found] == ["int4", "int8"]
    for layer in found:
        record = cache_record(layer.format).parts(config.kv_lora_rank, config.qk_rope_head_dim)
        assert [part.page_shape[1] for part in layer.parts] == [part.width for part in record]


def test_an_engine_for_each_gpu(graph: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    steps: list[str] = []
    report = export_tensorrt(
        graph,
        tmp_path / "bundle",
        replace(SM89, targets=("sm89", "sm120", "sm80+")),
        progress=lambda done, total, what: steps.append(what),
    )
    bundle = Bundle.open(tmp_path / "bundle", verify=True)
    info = bundle.manifest.tensorrt
    assert info is not None
    assert [engine.target for engine in info.engines] == ["sm89", "sm120", "sm80+"]
    assert steps
    weights = (graph / "model.onnx.data").stat().st_size
    codes = sum(
        math.prod(one.dims) // 2
        for one in onnx.load(graph / "model.onnx", load_external_data=False).graph.initializer
        if one.data_type == onnx.TensorProto.INT4
    )
    for made, entry in zip(report.engines, info.engines, strict=True):
        assert made.version == info.version
        # 4 bits stayed 4 bits, and both profiles share them: not even one matrix in two is wider.
        assert weights * 0.9 < made.weights_bytes < weights + 1.5 * codes
        assert len(made.scratch_bytes) == 2
        assert made.bytes == bundle.file(entry.path).stat().st_size > weights
        context = onnx.load(bundle.file(entry.context))
        (node,) = context.graph.node
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["ep_cache_context"] == entry.path.encode()
        assert attributes["hardware_architecture"] == entry.target[2:].encode()
        assert list(node.input) == [one.name for one in info.inputs]
        assert list(node.output) == [one.name for one in info.outputs]
    assert not (bundle.path / "model.onnx.data").exists()
    assert bundle.has("tokenizer.json")


def test_the_graph_alone_needs_no_tensorrt(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(graph, verify=True)
    assert (bundle.manifest.graph.backend, bundle.manifest.graph.lowering) == ("tensorrt", "rtx1.7")
    info = bundle.manifest.tensorrt
    assert info is not None
    assert info.engines == []
    assert info.version is None
    assert [profile.tokens for profile in info.profiles] == [(1, 32, 32), (1, 1, 1)]
    assert bundle.kv_bytes_per_token == 32 + 2 + 2 + 16 + 2
    names = {one.name for one in info.inputs}
    assert {"input_ids", "past_lengths", "logit_index", "cache.0.codes"} <= names
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    assert [one.name for one in model.graph.input] == [one.name for one in info.inputs]
    assert [one.name for one in model.graph.output] == [one.name for one in info.outputs]
    # Only the rows of new tokens come out: nothing copies the cache.
    assert all("rows" not in one.shape for one in info.outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TensorRtOptions(), "none is named"),
        (replace(SM89, targets=("sm90",)), "does not build for this GPU"),
        (replace(SM89, targets=("sm89", "sm89")), "named twice"),
        (replace(SM89, compat="trt9"), "no table"),
        (replace(SM89, dtype="int8"), "dtype is out of range"),
        (replace(SM89, targets=("sm75",), dtype="bf16"), "no bfloat16"),
        (replace(SM89, max_tokens=1), "max_tokens is out of range"),
        (replace(SM89, prefill_chunk=1), "prefill_chunk is out of range"),
        (replace(SM89, timeout=0), "timeout is out of range"),
        (replace(SM89, onnx_only=True), "same for every GPU"),
    ],
)
def test_options_that_do_not_fit(
    source: Path, tmp_path: Path, options: TensorRtOptions, message: str
) -> None:
    expect(UsageError, message, source, tmp_path, options)


def test_old_gpus_take_no_matrices_in_4_bits(
    source: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "check_backend", lambda *_: None)
    options = replace(SM89, targets=("sm89", "sm75"))
    for where in (source, graph):
        expect(UsageError, "sm75 multiplies no matrices", where, tmp_path, options)


@pytest.mark.parametrize(("target", "capability_name"), [("sm89", "SM89"), ("sm80+", None)])
def test_what_an_engine_is_built_with(target: str, capability_name: str | None) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    wanted = compute_capability(target, capability("rtx1.7"))
    assert wanted == capability_name
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    request = {"plugin": None, "compute_capability": wanted, "profiles": []}
    config = worker_module._configured(trt, builder, request)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.max_aux_streams == 0
    plain = builder.create_builder_config().num_compute_capabilities
    assert config.num_compute_capabilities == (plain if wanted is None else 1)
    if wanted is not None:
        assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    assert compute_capability("sm87", capability("trt10.3")) is None


def test_the_installed_worker_is_meant_and_not_a_checkout(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder `mla_deploy` where the program is started, as in a checkout."""
    (tmp_path / "mla_deploy").mkdir()
    (tmp_path / "mla_deploy" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    asked = json.dumps({"module": "no_such_tensorrt", "log": None})
    made = subprocess.run(
        build.worker_command(), input=asked, capture_output=True, text=True, check=False
    )
    assert "No module named 'no_such_tensorrt'" in made.stderr


def test_a_missing_tensorrt(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_is_installed", lambda _: False)
    expect(UsageError, "tensorrt_rtx is not installed", source, tmp_path, SM89)


def test_another_tensorrt(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_is_installed", lambda _: True)
    monkeypatch.setattr(build, "_installed_version", lambda _: "3.0")
    expect(UsageError, "not the one that the graph is made for", source, tmp_path, SM89)


def test_a_jetson_engine_is_built_on_the_jetson(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_is_installed", lambda _: True)
    monkeypatch.setattr(build, "_installed_version", lambda _: "10.3.0")
    monkeypatch.setattr(build, "gpu_target", lambda: None)
    options = replace(SM89, targets=("sm87",), compat="trt10.3")
    expect(UsageError, "the GPU that it runs on", source, tmp_path, options)


def test_too_little_memory_is_known_beforehand(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: Any
) -> None:
    worker("raise SystemExit('nobody asked')")
    monkeypatch.setattr(build, "available_memory", lambda: 100 << 20)
    expect(BuildError, "too little memory", graph, tmp_path, SM89)


def test_too_little_disk_is_known_beforehand(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: Any
) -> None:
    worker("raise SystemExit('nobody asked')")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    expect(OutputError, "too full", graph, tmp_path, SM89)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import time; time.sleep(60)", "takes too long"),
        ("import os; os.kill(os.getpid(), 9)", "ended without a result"),
        ('print(\'{"error": "no kernel"}\')', "cannot build"),
        ("print('a library that prints')", "ended without a result"),
        ("raise ImportError('no libcudart')", "exit status 1: ImportError: no libcudart"),
    ],
)
def test_a_build_that_fails(
    graph: Path, tmp_path: Path, worker: Any, code: str, message: str
) -> None:
    worker(code)
    expect(BuildError, message, graph, tmp_path, replace(SM89, timeout=3))


def test_a_half_written_engine_goes(
    graph: Path, tmp_path: Path, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(
        "import json, sys; r = json.loads(sys.stdin.read()); open(r['engine'], 'w').write('x'); "
        "sys.exit(1)"
    )
    expect(BuildError, "without a result", graph, tmp_path, SM89)


def test_a_graph_made_for_another_tensorrt(graph: Path, tmp_path: Path, worker: Any) -> None:
    worker("")
    options = replace(SM89, compat="trt11")
    expect(UsageError, "another TensorRT", graph, tmp_path, options)


def test_a_bundle_without_a_graph(graph: Path, tmp_path: Path) -> None:
    expect(BundleError, "not the graph for TensorRT", graph, tmp_path, ONNX)


def test_an_unknown_family(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "other")
    raw = json.loads((source / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw))
    expect(ConfigError, "gpt2|model_type|family", tmp_path / "other", tmp_path, ONNX)


def test_an_engine_of_another_gpu_or_version(graph: Path) -> None:
    info = Bundle.open(graph).manifest.tensorrt
    assert info is not None
    with pytest.raises(BundleError, match="no engine yet"):
        engine_for(info, "bundle", "sm89")
    engine = {"target": "sm89", "path": "sm89.engine", "context": "sm89.onnx"}
    built = info.model_validate(info.model_dump() | {"version": "1.7.1", "engines": [engine]})
    assert engine_for(built, "bundle", "sm89").path == "sm89.engine"
    with pytest.raises(BundleError, match="no engine for this GPU") as caught:
        engine_for(built, "bundle", "sm120")
    assert "--target sm120" in str(caught.value)
    with pytest.raises(UsageError, match="NVIDIA GPU"):
        engine_for(built, "bundle", None)
    both = [{**engine, "target": "sm80+", "path": "sm80+.engine"}, engine]
    built = info.model_validate(info.model_dump() | {"version": "1.7.1", "engines": both})
    assert engine_for(built, "bundle", "sm89").path == "sm89.engine"
    for later in ("sm80", "sm90", "sm120"):
        assert engine_for(built, "bundle", later).path == "sm80+.engine"
    with pytest.raises(BundleError, match="no engine for this GPU"):
        engine_for(built, "bundle", "sm75")
    check_version(built, "bundle", "sm89", "1.7.1")
    with pytest.raises(BundleError, match="another TensorRT") as caught:
        check_version(built, "bundle", "sm89", "1.8.0")
    assert "build them again" in str(caught.value)


def test_profiles_in_the_other_order(graph: Path) -> None:
    info = Bundle.open(graph).manifest.tensorrt
    assert info is not None
    with pytest.raises(ValidationError, match="export the model again"):
        info.model_validate(info.model_dump() | {"profiles": info.profiles[::-1]})


def expect(
    kind: type[MlaError], message: str, source: Path, folder: Path, options: TensorRtOptions
) -> None:
    """It fails with that message, and leaves nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(kind) as error:
        export_tensorrt(source, folder / "bundle", options)
    assert re.search(message, str(error.value))
    assert sorted(folder.iterdir()) == before
