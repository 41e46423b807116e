"""Graphs for TensorRT with the plugin: one node of attention, over a cache of pages."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.gpu import engine_target
from support.host_engine import HostDevice, host_graph
from support.models import VOCAB, random_model, save_checkpoint
from support.plugin import built_plugin

from mla_deploy.bundle import Bundle
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import ConfigError, SessionError, UsageError
from mla_deploy.exporters.onnx.attention_function import OPSET, AttentionFunctions
from mla_deploy.exporters.tensorrt.capability import CAPABILITIES
from mla_deploy.exporters.tensorrt.export import TensorRtOptions, export_tensorrt
from mla_deploy.exporters.tensorrt.plugin import check_plugin
from mla_deploy.gpu import gpu_target
from mla_deploy.model import forward_window, load_model
from mla_deploy.quant.quantize import QuantizeOptions, quantize_checkpoint
from mla_deploy.runtime import load
from mla_deploy.runtime.tensorrt import TensorRtEngine
from mla_deploy.runtime.tensorrt_plugin import plugin_library

OPTIONS = TensorRtOptions(
    onnx_only=True, dtype="fp32", max_tokens=256, prefill_chunk=48, plugin=True
)
PROMPT, STEPS = 70, 8


@pytest.fixture(scope="module")
def sources(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A layer of each kind, of a rank that the CUDA kernels have, by cache format: in both layers,
    or as it is by default."""
    folder = tmp_path_factory.mktemp("plugin")
    model = random_model(
        "deepseek_v3", moe=True, yarn=True, q_lora=True, q_lora_rank=64, v_head_dim=24,
        kv_lora_rank=256, num_hidden_layers=2, sharpness=1.0,
    )  # fmt: skip
    save_checkpoint(model, folder / "float", tiny_mla)
    caches: dict[str, dict[str, Any]] = {
        "fp16": {"kv": "fp16"}, "int4": {"kv_first": "int4"}, "default": {},
    }  # fmt: skip
    for name, cache in caches.items():
        options = QuantizeOptions(weights="none", **cache)
        quantize_checkpoint(folder / "float", folder / name, options)
    return {name: folder / name for name in caches}


@pytest.fixture(scope="module")
def bundles(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        name: export_tensorrt(source, folder / name, OPTIONS).bundle
        for name, source in sources.items()
    }


def test_the_node_is_that_of_the_onnx_bundle(
    sources: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    from mla_deploy.exporters.onnx.export import export_onnx

    export_onnx(sources["int4"], tmp_path / "onnx")
    mine, theirs = (
        onnx.load(folder / "model.onnx", load_external_data=False)
        for folder in (bundles["int4"], tmp_path / "onnx")
    )
    assert not mine.functions
    nodes, others = (
        [node for node in model.graph.node if node.op_type == "LatentAttention"]
        for model in (mine, theirs)
    )
    assert len(nodes) == 2
    for node, other in zip(nodes, others, strict=True):
        assert (node.domain, len(node.input)) == (other.domain, len(other.input))
        values, expected = (
            {one.name: onnx.helper.get_attribute_value(one) for one in each.attribute}
            for each in (node, other)
        )
        assert values == expected
    rest = {node.op_type for node in mine.graph.node} - {"LatentAttention"}
    assert rest <= CAPABILITIES["rtx1.7"].operators


def test_a_jetsons_parser_knows_all_but_the_node(sources: dict[str, Path], tmp_path: Path) -> None:
    options = replace(OPTIONS, compat="trt10.3", dtype="fp16")
    bundle = export_tensorrt(sources["int4"], tmp_path / "bundle", options).bundle
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    unknown = {node.op_type for node in model.graph.node} - CAPABILITIES["trt10.3"].operators
    assert unknown == {"LatentAttention"}


def test_the_manifest_tells_of_the_plugin_and_its_pages(bundles: dict[str, Path]) -> None:
    manifest = Bundle.open(bundles["int4"], verify=True).manifest
    info = manifest.tensorrt
    assert info is not None
    assert info.plugin
    shapes = {one.name: (one.dtype, one.shape) for one in info.inputs}
    assert shapes["cache.0.codes"] == ("int8", ["pages", 4, 32, 16, 4])
    assert shapes["block_table"] == ("int64", [1, "pages_per_sequence"])
    assert {one.name for one in info.outputs} >= {"logits", "present.1.k_pe_scale"}
    assert info.profiles[0].extent("pages") == (2, 2, 5)
    assert info.profiles[0].extent("pages_per_sequence") == (1, 1, 4)
    assert manifest.cache.layers[0].parts[0].page_shape == [4, 32, 16, 4]


def test_the_manifest_tells_of_a_first_layer_of_its_own(bundles: dict[str, Path]) -> None:
    manifest = Bundle.open(bundles["default"], verify=True).manifest
    assert [layer.format for layer in manifest.cache.layers] == ["int8", "int4"]
    info = manifest.tensorrt
    assert info is not None
    shapes = {one.name: one.shape for one in info.inputs}
    assert shapes["cache.0.codes"] == ["pages", 4, 64, 16, 4]
    assert shapes["cache.1.codes"] == ["pages", 4, 32, 16, 4]


def generate(graph: Any, ids: list[int]) -> Any:
    """Logits of a prompt in two chunks, and of steps after it."""
    place = graph.cache.open()
    found = [graph.append(place, ids[:PROMPT], 0, range(PROMPT))]
    for past in range(PROMPT, len(ids)):
        found.append(graph.append(place, ids[past : past + 1], past, [0]))
    return np.concatenate(found)


def rounded_reference(source: Path, ids: list[int]) -> Any:
    """The torch reference with the absorbed weights in float16, as the node has them."""
    model = load_model(source)
    for name, parameter in model.named_parameters():
        if name.endswith(("w_uk", "w_uv")):
            parameter.data = parameter.data.half().float()
    return forward_window(model, Checkpoint(source).config, torch.tensor([ids]))[0].numpy()


def test_standard_operators_in_place_of_the_node_equal_the_reference(
    sources: dict[str, Path], bundles: dict[str, Path]
) -> None:
    """What the node is defined as, in float32: all but the kernel is right."""
    model = ir.load(bundles["fp16"] / "model.onnx")
    functions = AttentionFunctions()
    for node in model.graph:
        if node.op_type == "LatentAttention":
            attributes = {name: one.value for name, one in node.attributes.items()}
            node.overload = functions.overload(attributes, torch.float16)
    model.functions.update({one.identifier(): one for one in functions.functions})
    model.graph.opset_imports[""] = OPSET
    ir.save(model, bundles["fp16"] / "stock.onnx")
    ids = torch.randint(VOCAB, (PROMPT + STEPS,)).tolist()
    found = generate(host_graph(bundles["fp16"], graph="stock.onnx"), ids)
    expected = rounded_reference(sources["fp16"], ids)
    error = np.abs(found - expected).max(1) / np.abs(expected).max()
    # A number that float16 rounds otherwise, or a near tie of experts, may show.
    assert np.median(error) < 1e-4
    assert np.quantile(error, 0.9) < 1e-3


@pytest.mark.parametrize(
    ("cache_format", "most"), [("fp16", 1e-2), ("int4", 5e-2), ("default", 5e-2)]
)
def test_the_graph_as_it_is_runs_with_the_operator_library(
    sources: dict[str, Path], bundles: dict[str, Path], cache_format: str, most: float
) -> None:
    """With the CPU's kernels, which compute in bfloat16 and int8; codes at an edge may flip."""
    ids = torch.randint(VOCAB, (PROMPT + STEPS,)).tolist()
    found = generate(host_graph(bundles[cache_format]), ids)
    expected = rounded_reference(sources[cache_format], ids)
    error = np.abs(found - expected).max(1) / np.abs(expected).max()
    assert np.median(error) < most


def test_the_cache_is_written_in_place(bundles: dict[str, Path]) -> None:
    graph = host_graph(bundles["int4"])
    device = graph._device
    assert isinstance(device, HostDevice)
    for name, address in graph._addresses.items():
        if name.startswith("cache."):
            assert graph._addresses[name.replace("cache.", "present.")] == address
    engine = TensorRtEngine(Bundle.open(bundles["int4"]), graph)
    with engine.session() as session:
        session.prefill([5, 6, 7])
        assert device.copies == 0
        assert session.cache_bytes == 3 * engine.kv_bytes_per_token
        with pytest.raises(SessionError, match="whole pages"):
            session.fill_by_copies(100)
        session.prefill(list(range(80)))
        session.fill_by_copies(250)
        assert device.copies == 3 * 2 * 5  # three pages of five parts in two layers
        session.decode(8)
        assert session.length == 251


def test_a_step_that_fails_in_its_midst_changes_no_session(bundles: dict[str, Path]) -> None:
    graph = host_graph(bundles["int4"])
    engine = TensorRtEngine(Bundle.open(bundles["int4"]), graph)
    with engine.session() as first, engine.session() as second:
        engine.step([(first, [5, 6]), (second, [7])])
        free, append = engine.free_tokens, graph.append
        ended = iter((False, True))

        def fail_second(*arguments: Any) -> Any:
            if next(ended):
                raise SessionError("the GPU is gone")
            return append(*arguments)

        graph.append = fail_second  # type: ignore[method-assign]
        with pytest.raises(SessionError, match="gone"):
            engine.step([(first, [1] * 70), (second, [2])])
        assert (first.tokens, second.tokens) == ((5, 6), (7,))
        assert engine.free_tokens == free


def test_sessions_and_forks_share_the_pages(bundles: dict[str, Path]) -> None:
    """Whatever they share, each gives the logits that it gives alone."""
    engine = TensorRtEngine(Bundle.open(bundles["int4"]), host_graph(bundles["int4"]))
    ids = torch.randint(VOCAB, (90,)).tolist()

    def alone(tokens: list[int], last: int) -> Any:
        with engine.session() as session:
            session.prefill(tokens)
            return session.decode(last)

    expected = {last: alone(ids, last) for last in (5, 6, 7)}
    assert engine.cache.free == 4
    first, other = engine.session(), engine.session()
    first.prefill(ids)
    fork = first.fork()
    assert (fork.tokens, engine.cache.free) == (first.tokens, 2)
    other.prefill(ids[:10])
    assert other.room == 128 - 10
    # The second page is shared: whoever goes on first gets a copy, and the cache is full.
    np.testing.assert_array_equal(fork.decode(5), expected[5])
    assert engine.cache.free == 0
    extra = first.fork()
    with pytest.raises(SessionError, match="cache is full"):
        extra.decode(1)
    extra.close()
    one, two = engine.step([(first, [6]), (other, [3])])
    np.testing.assert_array_equal(one, expected[6])
    assert two.shape == one.shape
    fork.rewind(90)
    np.testing.assert_array_equal(fork.decode(7), expected[7])
    with pytest.raises(UsageError, match="twice"):
        engine.step([(first, [1]), (first, [1])])
    fork.close()
    other.close()
    assert engine.cache.free == 2
    first.rewind(64)
    pair = first.fork(), first.fork()
    assert engine.cache.free == 3
    with pytest.raises(SessionError, match="all of these sessions together"):
        engine.step([(pair[0], ids), (pair[1], ids)])
    assert pair[0].length == 64
    first.close()
    del pair  # like one that is closed
    gc.collect()
    assert engine.cache.free == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 128}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 24}, "qk_rope_head_dim"),
        ({"qk_nope_head_dim": 20}, "qk_nope_head_dim"),
        ({"v_head_dim": 20}, "v_head_dim"),
        ({"num_attention_heads": 129}, "number of heads"),
    ],
)
def test_models_that_the_kernels_do_not_have(
    sources: dict[str, Path], changes: dict[str, int], message: str
) -> None:
    config = Checkpoint(sources["int4"]).config
    check_plugin(config)
    with pytest.raises(ConfigError, match=message) as caught:
        check_plugin(replace(config, **changes))
    assert "without --plugin" in str(caught.value)


def test_a_cache_that_the_kernels_do_not_have(tiny_mla: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        export_tensorrt(tiny_mla, tmp_path / "bundle", OPTIONS)
    assert not list(tmp_path.iterdir())


def test_an_engine_needs_the_library(bundles: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = replace(OPTIONS, onnx_only=False, targets=("sm89",), plugin=False)
    with pytest.raises(UsageError, match="this installation has none") as caught:
        export_tensorrt(bundles["int4"], tmp_path / "bundle", options)
    assert "--onnx-only" in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="no kernels for this GPU"):
        export_tensorrt(
            bundles["int4"], tmp_path / "bundle", replace(options, targets=("sm75",), plugin=True)
        )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tensorrt_builds_an_engine_with_the_plugin(
    sources: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = replace(
        OPTIONS, onnx_only=False, targets=("sm89",), dtype=dtype, plugin_library=built_plugin()
    )
    report = export_tensorrt(sources["int4"], tmp_path / "bundle", options)
    (made,) = report.engines
    assert made.bytes == (tmp_path / "bundle" / "sm89.engine").stat().st_size
    info = Bundle.open(tmp_path / "bundle").manifest.tensorrt
    assert info is not None
    assert info.plugin


@pytest.mark.gpu
@pytest.mark.skipif(gpu_target() is None, reason="there is no NVIDIA GPU")
def test_an_engine_gives_what_the_stand_in_gives(bundles: dict[str, Path], tmp_path: Path) -> None:
    library = plugin_library()
    if library is None:
        pytest.skip("this installation has no plugin")
    options = replace(
        OPTIONS, onnx_only=False, targets=(engine_target(own=False),), plugin_library=library
    )
    built = export_tensorrt(bundles["int4"], tmp_path / "bundle", options).bundle
    ids = torch.randint(VOCAB, (PROMPT + STEPS,)).tolist()
    expected = generate(host_graph(bundles["int4"]), ids)
    with load(built).session() as session:
        found = [session.prefill(ids[:PROMPT], all_logits=True)]
        found += [session.decode(token)[None] for token in ids[PROMPT:]]
    error = np.abs(np.concatenate(found) - expected).max(1) / np.abs(expected).max()
    assert np.median(error) < 5e-2
