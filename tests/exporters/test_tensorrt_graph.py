"""What a graph for TensorRT is made of, for each version that there is a table for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.models import random_model, save_checkpoint

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.exporters.onnx.graph import DecoderGraph, build_graph
from mla_deploy.exporters.tensorrt.capability import CAPABILITIES, Capability
from mla_deploy.exporters.tensorrt.target import TensorRt
from mla_deploy.exporters.tensorrt.weights import QuantizedWeight, gate_then_up, pack_int4
from mla_deploy.packing import dequantize, pack, unpack
from mla_deploy.quant.quantize import QuantizeOptions, quantize_checkpoint


@pytest.fixture(scope="module")
def source(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Every op that there is: experts, both kinds of planes, a quantised embedding, both norms."""
    folder = tmp_path_factory.mktemp("source")
    model = random_model(
        "deepseek_v3", moe=True, yarn=True, q_lora=True, q_lora_rank=64, v_head_dim=24,
        num_hidden_layers=2,
    )  # fmt: skip
    save_checkpoint(model, folder / "float", tiny_mla)
    options = QuantizeOptions(embedding="int8", experts="int8", group=32)
    quantize_checkpoint(folder / "float", folder / "quantized", options)
    return Checkpoint(folder / "quantized")


@pytest.fixture(scope="module", params=CAPABILITIES)
def lowered(request: pytest.FixtureRequest, source: Checkpoint) -> tuple[Capability, DecoderGraph]:
    capability = CAPABILITIES[request.param]
    return capability, build_graph(source.config, TensorRt(capability, torch.float16))


def test_the_parser_lists_every_operator(lowered: tuple[Capability, DecoderGraph]) -> None:
    capability, graph = lowered
    used = {node.op_type for node in graph.builder.nodes}
    assert used <= capability.operators
    assert all(node.domain == "" for node in graph.builder.nodes)
    assert not graph.model.functions
    assert dict(graph.model.graph.opset_imports) == {"": capability.opset}


def test_operators_are_of_the_opset(lowered: tuple[Capability, DecoderGraph]) -> None:
    capability, graph = lowered
    for node in graph.builder.nodes:
        schema = onnx.defs.get_schema(node.op_type, capability.opset)
        assert schema.since_version <= capability.opset
        assert not schema.deprecated


def test_norms_are_fused_where_the_version_can(lowered: tuple[Capability, DecoderGraph]) -> None:
    capability, graph = lowered
    used = {node.op_type for node in graph.builder.nodes}
    assert ("RMSNormalization" in used) == (capability.name != "trt10.3")


def test_bytes_are_met_at_inputs_and_outputs_only(
    lowered: tuple[Capability, DecoderGraph],
) -> None:
    """TensorRT has no uint8 and no int8 in between."""
    graph = lowered[1].model.graph
    inputs = {value for value in graph.inputs if value.dtype in (onnx.TensorProto.UINT8, 3)}
    assert inputs
    for value in inputs:
        assert {node.op_type for node in value.consumers()} <= {"Cast", "DequantizeLinear"}
    narrow = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    casts = [n for n in lowered[1].builder.nodes if n.op_type == "Cast"]
    for node in casts:
        if node.attributes["to"].as_int() in narrow:
            assert node.outputs[0] in graph.outputs


def test_weights_are_signed_nibbles(lowered: tuple[Capability, DecoderGraph]) -> None:
    found = {one.name: one for one in lowered[1].builder.initializers.values()}
    experts = found["model.layers.1.mlp.experts.gate_up_codes"]
    assert experts.dtype == onnx.TensorProto.INT4
    assert experts.shape == (8, 2 * 96, 128)  # two planes of 8-bit codes below each other
    assert experts.nbytes == 8 * 96 * 128  # the bytes that the checkpoint has


def test_rtx_knows_the_operators_of_its_table() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    for name in CAPABILITIES["rtx1.7"].operators:
        assert parser.supports_operator(name), name


@pytest.mark.parametrize("bits", [4, 8])
def test_planes_and_correction_are_the_matrix(bits: int) -> None:
    """In float64, where nothing rounds."""
    codes = torch.randint(1 << bits, (2, 6, 64), dtype=torch.uint8)
    scales, zeros = torch.rand(2, 6, 2), torch.rand(2, 6, 2) * (1 << bits)
    expected = dequantize(pack(codes, bits), scales, zeros, bits, torch.float64)
    values = {"codes": pack(codes, bits), "scales": scales, "zeros": zeros}
    weight = QuantizedWeight(*(fake_weight(n, v) for n, v in values.items()), bits, gate_then_up)
    packed = torch.cat(list(weight.code_chunks(lambda *_: torch.empty(0))))
    signed = unpack(packed, 4).to(torch.int8)
    signed = torch.where(signed > 7, signed - 16, signed).reshape(2, -1, 6).double()
    (steps, correction) = (
        torch.cat(list(chunks(lambda *_: torch.empty(0)))).reshape(2, -1, 6)
        for chunks in (
            weight.scale_chunks(torch.float64),
            weight.correction_chunks(torch.float64),
        )
    )
    planes = (signed * steps.repeat_interleave(32, 1)).unflatten(1, (bits // 4, 64)).sum(1)
    found = planes + correction.repeat_interleave(32, 1)
    torch.testing.assert_close(found.transpose(1, 2), gate_then_up(expected), rtol=1e-5, atol=1e-5)


def fake_weight(name: str, value: torch.Tensor) -> Any:
    from mla_deploy.exporters.onnx.translate import Weight
    from mla_deploy.sources import Source

    class Held(Source):
        def tensors(self) -> dict[str, tuple[int, ...]]:
            return {}

        def slabs(self, read: Any) -> Any:
            yield from value.split(1)

    return Weight(name, tuple(value.shape), value.dtype, Held())


def test_nibbles_are_packed_as_onnx_does() -> None:
    codes = torch.randint(16, (8, 6), dtype=torch.uint8)
    signed = (codes.to(torch.int8) - 8).numpy()
    expected = onnx.helper.make_tensor("x", onnx.TensorProto.INT4, signed.shape, signed.flatten())
    found = onnx.TensorProto.FromString(expected.SerializeToString())
    found.ClearField("int32_data")
    found.raw_data = pack_int4(codes).numpy().tobytes()
    assert (onnx.numpy_helper.to_array(found).astype(int) == signed).all()


def test_one_recipe_of_zeros_is_like_another(source: Checkpoint, tmp_path: Path) -> None:
    """Whole zeros and HQQ's exact ones take the same way, also for experts."""
    shutil.copytree(source.path, tmp_path / "exact")
    raw = json.loads((tmp_path / "exact" / "config.json").read_text())
    raw["mla_deploy"]["experts"]["zeros"] = "exact"
    (tmp_path / "exact" / "config.json").write_text(json.dumps(raw))
    other = Checkpoint(tmp_path / "exact")
    target = TensorRt(CAPABILITIES["rtx1.7"], torch.float32)
    graph = build_graph(other.config, target)
    assert "model.layers.1.mlp.experts.gate_up_zeros.correction" in graph.builder.initializers
