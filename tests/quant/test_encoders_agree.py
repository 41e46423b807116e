"""One record, three encoders: Python, the ONNX function in stock ONNX Runtime, and the C++ kernels.

Random and adversarial latents are appended without norm and rotation, so that the encoders are
given the very same numbers. They may add up a group in another order, and a value that lies on a
rounding edge may then fall either way.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from mla_deploy.cache import cache_record
from mla_deploy.errors import CheckpointError
from mla_deploy.exporters.onnx.attention_function import ATTENTION_DOMAIN, OPSET, AttentionFunctions
from mla_deploy.exporters.onnx.builder import DTYPES
from mla_deploy.runtime import _runtime

ort = pytest.importorskip("onnxruntime")

RANK, ROPE, TOKENS = 128, 32, 64
QUANTIZED = ("int2", "int3", "int4", "int4-g32", "int8", "fp8")
NATIVE = ("int4", "int8")
CODES_APART = 1e-4
"""Share of codes that may differ, by one step."""
GROUPS_APART = 2e-3
"""Share of groups whose scale and zero may differ by more than two units in the last place: a code
on an edge in an early round moves them."""
KINDS: dict[str, Any] = {
    "normal": lambda g: torch.randn(RANK, generator=g),
    "heavy": lambda g: torch.randn(RANK, generator=g) ** 5,
    "zeros": lambda g: torch.zeros(RANK),
    "constant": lambda g: torch.randn(1, generator=g).expand(RANK),
    "huge outlier": lambda g: (
        torch.randn(RANK, generator=g)
        + 3e4 * (torch.arange(RANK) == torch.randint(RANK, (), generator=g))
    ),
    "denormal": lambda g: torch.randn(RANK, generator=g) * 1e-40,
    "below float16": lambda g: torch.randn(RANK, generator=g) * 1e-9,
    "one-hot": lambda g: torch.eye(RANK)[torch.randint(RANK, (), generator=g)],
    "two values": lambda g: torch.randint(2, (RANK,), generator=g) * 2.0 - 1,
    "far from zero": lambda g: 1000 + torch.rand(RANK, generator=g),
    "large": lambda g: torch.randn(RANK, generator=g) * 1e4,
}

Array = npt.NDArray[Any]


@functools.cache
def stock_session(cache_format: str) -> Any:
    """A model of one LatentAttention node, which ONNX Runtime inlines."""
    attributes: dict[str, Any] = {
        "cache_format": cache_format, "kv_lora_rank": RANK, "latent_norm_epsilon": -1.0,
        "mode": "auto", "num_heads": 1, "qk_nope_head_dim": 4, "qk_rope_head_dim": ROPE,
        "softmax_scale": 1.0, "v_head_dim": 4,
    }  # fmt: skip
    functions = AttentionFunctions()
    overload = functions.overload(attributes, torch.float32)
    names = ["q", "kv", "cos", "sin", "w_uk", "w_uv", "block_table", "past_lengths", "new_lengths"]
    inputs = [
        helper.make_tensor_value_info(n, 1 if i < 6 else 7, None) for i, n in enumerate(names)
    ]
    outputs = [helper.make_tensor_value_info("output", 1, None)]
    parts = cache_record(cache_format).parts(RANK, ROPE)
    for part in parts:
        shape = ["pages", *part.page_shape]
        kind = int(DTYPES[part.dtype])
        inputs.append(helper.make_tensor_value_info(part.name, kind, shape))
        outputs.append(helper.make_tensor_value_info(f"present_{part.name}", kind, shape))
    node = helper.make_node(
        "LatentAttention", [one.name for one in inputs], [one.name for one in outputs],
        domain=ATTENTION_DOMAIN, overload=overload, **attributes,
    )  # fmt: skip
    model = helper.make_model(
        helper.make_graph([node], "encode", inputs, outputs),
        functions=[ir.to_proto(function) for function in functions.functions],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(ATTENTION_DOMAIN, 1)],
        ir_version=11,
    )
    assert isinstance(model, onnx.ModelProto)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def feeds(c_kv: torch.Tensor, k_pe: torch.Tensor) -> dict[str, Array]:
    tokens = len(c_kv)
    return {
        "q": np.zeros((1, tokens, 4 + ROPE), np.float32),
        "kv": torch.cat((c_kv, k_pe), -1).unsqueeze(0).numpy(),
        "cos": np.ones((1, tokens, ROPE // 2), np.float32),
        "sin": np.zeros((1, tokens, ROPE // 2), np.float32),
        "w_uk": np.zeros((1, 4, RANK), np.float32),
        "w_uv": np.zeros((1, RANK, 4), np.float32),
        "block_table": np.arange(1, -(-tokens // 64) + 1, dtype=np.int64)[None],
        "past_lengths": np.zeros(1, np.int64),
        "new_lengths": np.array([tokens]),
    }


def empty_cache(cache_format: str, tokens: int) -> list[Array]:
    parts = cache_record(cache_format).parts(RANK, ROPE)
    return [part.empty(-(-tokens // 64) + 1).numpy() for part in parts]


def by_python(cache_format: str, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
    return cache_record(cache_format).encode(c_kv, k_pe)


def by_onnx(cache_format: str, c_kv: torch.Tensor, k_pe: torch.Tensor) -> list[torch.Tensor]:
    parts = cache_record(cache_format).parts(RANK, ROPE)
    cache = empty_cache(cache_format, len(c_kv))
    named = {part.name: array for part, array in zip(parts, cache, strict=True)}
    _, *present = stock_session(cache_format).run(None, {**feeds(c_kv, k_pe), **named})
    return tokens_of(cache_format, present, len(c_kv))


def by_kernel(
    isa: str, cache_format: str, c_kv: torch.Tensor, k_pe: torch.Tensor
) -> list[torch.Tensor]:
    given = feeds(c_kv, k_pe)
    weights = _runtime.LatentAttentionWeights(given["w_uk"], given["w_uv"], ROPE, "fp32")
    cache = empty_cache(cache_format, len(c_kv))
    output = np.zeros((1, len(c_kv), 4), np.float32)
    order = ["block_table", "past_lengths", "new_lengths"]
    _runtime.latent_attention(
        _runtime.LatentAttentionExecutor(1), given["q"], given["kv"], given["cos"], given["sin"],
        weights, *(given[name] for name in order), cache, output, cache_format, 1.0, -1.0,
        isa=isa, append_only=True,
    )  # fmt: skip
    return tokens_of(cache_format, cache, len(c_kv))


def tokens_of(cache_format: str, arrays: list[Array], tokens: int) -> list[torch.Tensor]:
    """The pages as the record's values, one row a token."""
    parts = cache_record(cache_format).parts(RANK, ROPE)
    table = torch.arange(1, -(-tokens // 64) + 1).unsqueeze(0)
    return [
        part.read(torch.from_numpy(array), table)[0, :tokens]
        for part, array in zip(parts, arrays, strict=True)
    ]


def codes_of(cache_format: str, values: list[torch.Tensor]) -> torch.Tensor:
    """The latent's codes as whole numbers. Shapes: [T, rank]."""
    record = cache_record(cache_format)
    plain = [value.unsqueeze(0) for value in values]
    if cache_format == "int8":
        return plain[0][0].int()
    if cache_format == "fp8":  # in order of value, so that neighbours differ by one
        code = plain[0][0].int()
        return torch.where(code > 127, 128 - code, code)
    *planes, scale, zero, k_pe_codes, k_pe_scale = plain
    unit = [*planes, torch.ones_like(scale), torch.zeros_like(zero), k_pe_codes, k_pe_scale]
    return record.decode(unit, torch.float32)[0][0].int()


class Disagreement:
    """Counts over several comparisons."""

    def __init__(self) -> None:
        self.codes = self.codes_apart = self.groups = self.groups_apart = 0

    def add(
        self, cache_format: str, found: list[torch.Tensor], expected: list[torch.Tensor]
    ) -> None:
        parts = cache_record(cache_format).parts(RANK, ROPE)
        bad = torch.zeros(len(found[0]), dtype=torch.bool)
        for part, one, other in zip(parts, found, expected, strict=True):
            if part.dtype is torch.float16:
                assert bool(one.isfinite().all()), part.name
                # Bits of float16 in order of value: two apart at most.
                gap = (ordered(one) - ordered(other)).abs()
                largest = other.float().abs().amax(-1, keepdim=True)
                is_apart = (gap > 2) & ((one - other).float().abs() > 2e-3 * largest)
                self.groups += gap.numel()
                self.groups_apart += int(is_apart.sum())
                bad |= is_apart.any(-1)
        for one, other in (
            (codes_of(cache_format, found), codes_of(cache_format, expected)),
            (found[-2].int(), expected[-2].int()),
        ):
            gap = (one - other)[~bad].abs()
            assert int(gap.amax()) <= 1 if gap.numel() else True
            self.codes += gap.numel()
            self.codes_apart += int((gap > 0).sum())

    def check(self) -> None:
        print(f"{self.codes_apart} of {self.codes} codes, {self.groups_apart} of {self.groups}")
        assert self.codes_apart <= max(2, CODES_APART * self.codes)
        assert self.groups_apart <= max(2, GROUPS_APART * self.groups)


def ordered(x: torch.Tensor) -> torch.Tensor:
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def tokens(seed: int, kinds: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    c_kv = torch.stack([KINDS[kind](generator) for kind in kinds])
    k_pe = torch.stack([KINDS[kind](generator)[:ROPE] for kind in reversed(kinds)])
    return c_kv.float(), k_pe.float()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=TOKENS),
    cache_format=st.sampled_from(QUANTIZED),
)
def test_on_adversarial_latents(seed: int, kinds: list[str], cache_format: str) -> None:
    c_kv, k_pe = tokens(seed, kinds)
    expected = by_python(cache_format, c_kv, k_pe)
    encoders = [functools.partial(by_onnx, cache_format)]
    if cache_format in NATIVE:
        encoders += [functools.partial(by_kernel, isa, cache_format) for isa in _runtime.cpu_isas()]
    for encode in encoders:
        counts = Disagreement()
        counts.add(cache_format, encode(c_kv, k_pe), expected)
        counts.check()


@pytest.mark.parametrize("cache_format", QUANTIZED)
def test_on_many_random_latents(cache_format: str) -> None:
    """Enough codes to see one in 10,000."""
    c_kv = torch.randn(2000, RANK) * torch.rand(RANK).add(0.2)
    k_pe = torch.randn(2000, ROPE) * 4
    expected = by_python(cache_format, c_kv, k_pe)
    found = {"onnx": by_onnx(cache_format, c_kv, k_pe)}
    for isa in _runtime.cpu_isas() if cache_format in NATIVE else ():
        found[isa] = by_kernel(isa, cache_format, c_kv, k_pe)
    for name, values in found.items():
        print(name)
        counts = Disagreement()
        counts.add(cache_format, values, expected)
        counts.check()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused_before_it_is_cached(value: float) -> None:
    """An encoder inside a graph cannot raise; the op of the reference does."""
    kv = torch.randn(1, 3, RANK + ROPE)
    kv[0, 1, 5] = value
    given = {
        name: torch.from_numpy(array) for name, array in feeds(*tokens(0, ["normal"] * 3)).items()
    }
    cache = [torch.from_numpy(array) for array in empty_cache("int4", 3)]
    with pytest.raises(CheckpointError, match="not finite"):
        torch.ops.mla_deploy.latent_attention(
            given["q"], kv, given["cos"], given["sin"], given["w_uk"], given["w_uv"],
            given["block_table"], given["past_lengths"], given["new_lengths"], cache,
            "int4", 1.0, 1e-6, "auto",
        )  # fmt: skip
