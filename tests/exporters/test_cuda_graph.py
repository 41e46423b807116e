"""The graph for ONNX Runtime's CUDA provider, run by its CPU provider, against the torch reference.

Operators are spelled as the GPU's kernels take them; that these exist and compute the same is for a
machine with a GPU (`tools/gpu_check.sh`).

Where a code of a quantised cache or the choice of an expert lies at a rounding edge, it may fall
either way, and then that row shows it. So whole models are judged by the median of their rows, and
LatentAttention, to whose inputs no other rounding comes, by itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper
from support.graph_runner import GraphRunner
from support.models import VOCAB, random_model, relative_error, save_checkpoint

from mla_deploy.bundle import Bundle
from mla_deploy.cache import cache_record
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import ConfigError, UsageError
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.exporters.onnx.attention_function import ATTENTION_DOMAIN, AttentionFunctions
from mla_deploy.exporters.onnx.ort_cuda import OPSET
from mla_deploy.model import forward_window, load_model
from mla_deploy.ops import attention
from mla_deploy.quant.options import QuantizeOptions
from mla_deploy.quant.quantize import quantize_checkpoint

PROMPTS, STEPS = (5, 70, 33), 6
SIZES = {"hidden_size": 128, "intermediate_size": 192, "q_lora_rank": 64, "v_head_dim": 24}
CACHES = ("int4", "int8", "fp16")
TOLERANCE = 2e-3
MEDIAN = {"int4": 2e-2, "int8": 5e-3, "fp16": TOLERANCE}
"""For a row of logits of a whole model; codes that fall otherwise are in it."""


def with_recipe(source: Path, folder: Path, **changes: Any) -> Path:
    """The checkpoint with changes to the recipe in its config.json."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    raw["mla_deploy"] = {"version": 1} | raw.get("mla_deploy", {}) | changes
    file.write_text(json.dumps(raw))
    return folder


def export(checkpoint: Path, out: Path) -> Bundle:
    return Bundle.open(export_onnx(checkpoint, out, target="cuda").bundle)


def row_errors(checkpoint: Path, bundle: Bundle, texts: list[torch.Tensor]) -> torch.Tensor:
    """The largest deviation of each row of logits over the largest logit: three prompts of unequal
    length in one batch, then single tokens."""
    runner = GraphRunner(bundle, len(texts), max(PROMPTS) + STEPS)
    rows = [[one] for one in runner.append([t[:p] for t, p in zip(texts, PROMPTS, strict=True)])]
    for step in range(STEPS):
        new = [text[at + step, None] for text, at in zip(texts, PROMPTS, strict=True)]
        for kept, logits in zip(rows, runner.append(new), strict=True):
            kept.append(logits)
    model, config = load_model(checkpoint), Checkpoint(checkpoint).config
    errors = []
    for kept, text in zip(rows, texts, strict=True):
        expected = forward_window(model, config, text[None])[0]
        errors.append((torch.cat(kept) - expected).abs().amax(-1) / expected.abs().max())
    return torch.cat(errors)


@pytest.mark.parametrize("cache", CACHES)
def test_a_trained_model_gives_the_logits_of_the_reference(
    tiny_mla: Path, tmp_path: Path, cache: str
) -> None:
    """Experts in floating point: MoE."""
    source = with_recipe(tiny_mla, tmp_path / "source", cache_format=cache)
    texts = [torch.randint(4096, (prompt + STEPS,)) for prompt in PROMPTS]
    errors = row_errors(source, export(source, tmp_path / "bundle"), texts)
    assert errors.median() < MEDIAN[cache]
    if cache == "fp16":
        assert errors.quantile(0.95) < TOLERANCE


@pytest.fixture(scope="module", params=["dense", "moe", "minicpm3"])
def quantized(
    request: pytest.FixtureRequest, tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random model, its weights in int4, experts too."""
    root = tmp_path_factory.mktemp(request.param)
    moe = request.param == "moe"
    family = "minicpm3" if request.param == "minicpm3" else "deepseek_v3"
    model = random_model(family, moe=moe, yarn=True, q_lora=True, sharpness=1.0, **SIZES)
    source = save_checkpoint(model, root / "source", tiny_mla)
    options = QuantizeOptions(kv="fp16", weights="int4", embedding="int4", group=32)
    quantize_checkpoint(source, root / "small", options)
    return root / "small"


@pytest.fixture(scope="module")
def bundle(quantized: Path) -> Bundle:
    return export(quantized, quantized.with_name("bundle"))


def test_quantized_weights_give_the_logits_of_the_reference(
    quantized: Path, bundle: Bundle
) -> None:
    """MatMulNBits, QMoE, GatherBlockQuantized."""
    texts = [torch.randint(VOCAB, (prompt + STEPS,)) for prompt in PROMPTS]
    errors = row_errors(quantized, bundle, texts)
    assert errors.median() < TOLERANCE
    assert errors.quantile(0.75) < 2 * TOLERANCE


def test_the_graph_is_spelled_for_a_gpu(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.target == "cuda"
    assert manifest.cuda is not None
    assert manifest.cuda.dtype == "float16"
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    onnx.checker.check_model(bundle.file("model.onnx"))
    assert {one.domain: one.version for one in model.opset_import}[""] == OPSET == 23
    assert all(one.opset_import[0].version == OPSET for one in model.functions)
    types = {one.name: one.data_type for one in model.graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for node in model.graph.node:
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        weights = {types[name] for name in node.input if name in types}
        if node.op_type in ("MatMulNBits", "QMoE"):
            assert attributes.get("accuracy_level", 0) == 0
            assert weights == {half, onnx.TensorProto.UINT8}
            assert "".join(node.input[14:]) == "", "the GPU's QMoE takes no weights"
        elif node.op_type in ("LatentAttention", "MatMul"):
            assert weights == ({single} if "/gate/" in node.name else {half})
    assert (
        onnx.TensorProto.DataType.Name(model.graph.output[0].type.tensor_type.elem_type) == "FLOAT"
    )


@pytest.mark.parametrize("cache", CACHES)
def test_latent_attention_in_float16_equals_the_reference(cache: str) -> None:
    """Output and cache, on a batch with unequal pasts and padded tokens."""
    heads, nope, rope, rank, v, steps = 4, 32, 16, 128, 24, 3
    attributes = {
        "cache_format": cache,
        "kv_lora_rank": rank,
        "latent_norm_epsilon": 1e-6,
        "mode": "auto",
        "num_heads": heads,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "softmax_scale": 0.15,
        "v_head_dim": v,
    }
    past, new = torch.tensor([63, 10]), torch.tensor([3, 2])
    angle = torch.rand(2, steps, rope // 2) * 6
    inputs = {
        "q": torch.randn(2, steps, heads * (nope + rope)).half(),
        "kv": (20 * torch.randn(2, steps, rank + rope)).half(),  # squares that float16 cannot hold
        "cos": angle.cos(),
        "sin": angle.sin(),
        "w_uk": (torch.randn(heads, nope, rank) / 6).half(),
        "w_uv": (torch.randn(heads, rank, v) / 11).half(),
        "block_table": torch.tensor([[2, 4], [1, 0]]),
        "past_lengths": past,
        "new_lengths": new,
    }
    inputs["kv"][0, 0] *= 20
    parts = cache_record(cache).parts(rank, rope)
    held = {part.name: part.empty(5) for part in parts}
    expected, expected_cache = attention.reference(
        *inputs.values(), list(held.values()), cache, 0.15, 1e-6, "auto"
    )
    functions = AttentionFunctions(OPSET, torch.float16)
    overload = functions.overload(attributes, torch.float16)
    outputs = ["output", *(f"new_{part.name}" for part in parts)]
    node = helper.make_node(
        "LatentAttention", [*inputs, *held], outputs, domain=ATTENTION_DOMAIN, **attributes
    )
    node.overload = overload

    def describe(values: dict[str, torch.Tensor]) -> list[onnx.ValueInfoProto]:
        kinds = {
            name: helper.np_dtype_to_tensor_dtype(x.numpy().dtype) for name, x in values.items()
        }
        return [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]

    results = dict(zip(outputs, [expected, *expected_cache], strict=True))
    graph = helper.make_graph([node], "one", describe(inputs | held), describe(results))
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(ATTENTION_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    model.functions.extend(ir.to_proto(one) for one in functions.functions)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feeds = {name: x.numpy() for name, x in (inputs | held).items()}
    found = [torch.from_numpy(x) for x in session.run(None, feeds)]
    assert found[0].dtype is torch.float16
    for row, count in enumerate(new.tolist()):
        assert relative_error(found[0][row, :count].float(), expected[row, :count].float()) < 1e-3
    for one, other in zip(found[1:], expected_cache, strict=True):
        assert one.dtype is other.dtype
        differing = (one[1:] != other[1:]).sum()  # but for the scratch page
        assert differing <= 2, "codes at a rounding edge"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": "int4", "experts": "none"}, "rows of whole bytes"),
        ({}, "cannot multiply with these experts"),
    ],
    ids=["embedding", "experts"],
)
def test_what_the_provider_cannot_take_is_refused(
    tiny_mla: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """96 inputs are three groups, and no whole tiles."""
    sizes = SIZES | {"hidden_size": 96}
    model = random_model("deepseek_v3", moe=True, yarn=False, q_lora=True, **sizes)
    source = save_checkpoint(model, tmp_path / "source", tiny_mla)
    quantize_checkpoint(source, tmp_path / "small", QuantizeOptions(kv="fp16", group=32, **options))
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "small", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_unknown_target_is_refused(tiny_mla: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such target"):
        export_onnx(tiny_mla, tmp_path / "bundle", target="sm89")
