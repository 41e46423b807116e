"""The op on torch's tensors by the CUDA kernels, and reference modules on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention_case import AttentionCase, Dims, Error
from support.cuda import Machine, gpu_machine
from support.models import random_model, save_checkpoint

from mla_deploy import ops
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.errors import CheckpointError
from mla_deploy.families import load_config
from mla_deploy.model import build, forward_window, load_model
from mla_deploy.ops import attention
from mla_deploy.runtime import cuda, torch_cuda
from mla_deploy.runtime.cuda import CudaError

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SMALL = Dims(heads=2, nope=32, rank=256, rope=32, v=32)


def arguments(case: AttentionCase, machine: Machine, mode: str = "auto") -> list[Any]:
    """Of the op."""
    weights = (case.w_uk, case.w_uv, case.block_table, case.past, case.new)
    placed = [machine.place(one) for one in (*case.new_inputs(), *weights)]
    cache = [machine.place(part) for part in case.cache]
    return [*placed, cache, case.cache_format, case.scale, case.epsilon, mode]


@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
@pytest.mark.parametrize("cache_format", ["int4", "int8", "fp16"])
def test_it_is_the_op(machine: Machine, cache_format: str, mode: str) -> None:
    case = AttentionCase([70, 3], [3, 5], dims=SMALL, cache_format=cache_format)
    given = arguments(case, machine, mode)
    output, cache = torch_cuda.latent_attention(machine.kernels, *given)
    assert output.dtype == torch.float32
    error = Error.of(case.real(output.cpu()), case.oracle([part.cpu() for part in cache]))
    assert error.relative < 3e-3
    for before, untouched in zip(case.cache, given[9], strict=True):
        assert torch.equal(before, untouched.cpu())
    on_host = [x.cpu() if isinstance(x, torch.Tensor) else x for x in given]
    on_host[9] = case.cache
    expected, _ = ops.latent_attention(*on_host)
    assert Error.of(case.real(output.cpu()), case.real(expected).double()).relative < 2e-2


def test_a_record_without_a_kernel_stays_with_the_definition(machine: Machine) -> None:
    given = arguments(AttentionCase([20], [3], dims=SMALL, cache_format="fp32"), machine)
    found, cache = torch_cuda.latent_attention(machine.kernels, *given)
    expected, expected_cache = attention.reference(*given)
    for one, other in zip((found, *cache), (expected, *expected_cache), strict=True):
        assert torch.equal(one, other)


def test_tensors_that_are_views_and_weights_in_half(machine: Machine) -> None:
    case = AttentionCase([20], [3], dims=SMALL)
    given = arguments(case, machine)
    expected, expected_cache = torch_cuda.latent_attention(machine.kernels, *given)
    for place in (0, 1, 4, 5):
        wide = torch.cat([given[place], given[place]], -1)
        given[place] = wide[..., : wide.shape[-1] // 2]
    given[4], given[5] = given[4].half(), given[5].half()
    given[9] = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in given[9]]
    assert not any(part.is_contiguous() for part in given[9])
    found, present = torch_cuda.latent_attention(machine.kernels, *given)
    assert torch.equal(found, expected)
    for one, other in zip(present, expected_cache, strict=True):
        assert torch.equal(one, other)


def test_what_does_not_fit_is_refused(machine: Machine) -> None:
    def run(case: AttentionCase, **changed: Any) -> None:
        given = arguments(case, machine)
        for place, value in changed.items():
            given[int(place.removeprefix("at_"))] = value
        torch_cuda.latent_attention(machine.kernels, *given)

    case = AttentionCase([20], [3], dims=SMALL)
    q, kv, *_ = case.new_inputs()
    with pytest.raises(CheckpointError, match="not finite"):
        run(case, at_1=machine.place(kv / 0))
    with pytest.raises(CudaError, match="do not compute in this type"):
        run(case, at_0=machine.place(q.double()))
    with pytest.raises(CudaError, match="a length is negative"):
        run(case, at_7=machine.place(torch.tensor([1000])))
    with pytest.raises(CudaError, match="kv_lora_rank is 128"):
        run(AttentionCase([20], [3], dims=Dims(heads=2, nope=32, rank=128, rope=32, v=32)))


@pytest.mark.parametrize(
    ("place", "change", "message", "found", "allowed"),
    [
        (0, lambda q: q[..., :-8], "q has a shape", "[1, 3, 120]", "[1, 3, 128], from"),
        (0, lambda q: q[0], "q has a shape", "[3, 128]", "3 axes"),
        (1, lambda kv: kv[:, :2], "kv has a shape", "[1, 2, 288]", "[1, 3, 288], from"),
        (2, lambda cos: cos[:, :2], "cos has a shape", "[1, 2, 16]", "[1, 3, 16], from"),
        (3, lambda sin: sin.repeat(1, 1, 2), "sin has a shape", "[1, 3, 32]", "[1, 3, 16], from"),
        (5, lambda w: w[:, :-1], "w_uv has a shape", "[2, 255, 32]", "[2, 256, 32], from"),
        (6, lambda table: table.int(), "block_table is of a type", "torch.int32", "torch.int64"),
        (6, lambda table: table[0], "block_table has a shape", "[1]", "2 axes"),
        (6, lambda table: table.to("meta"), "block_table is not where q is", "meta", ""),
        (7, lambda past: past.int(), "past_lengths is of a type", "torch.int32", "torch.int64"),
        (7, lambda past: past.repeat(2), "past_lengths has a shape", "[2]", "[1], from"),
        (8, lambda new: new.float(), "new_lengths is of a type", "torch.float32", "torch.int64"),
        (8, lambda new: new.to("meta"), "new_lengths is not where q is", "meta", ""),
        (9, lambda cache: cache[:4], "number of cache parts", "4", "5 for int4: "),
        (
            9,
            lambda cache: [cache[0][:, :, :-1], *cache[1:]],
            "part codes has a shape",
            "[2, 4, 31, 16, 4]",
            "[2, 4, 32, 16, 4], of int4",
        ),
        (
            9,
            lambda cache: [cache[0], cache[1][:1], *cache[2:]],
            "part scale has a shape",
            "[1, ",
            "[2, ",
        ),
        (
            9,
            lambda cache: [cache[0].char(), *cache[1:]],
            "part codes is of a type",
            "torch.int8",
            "torch.uint8",
        ),
        (9, lambda cache: [*cache[:4], cache[4].to("meta")], "is not where q is", "meta", ""),
    ],
)
def test_tensors_of_another_call_are_refused(
    machine: Machine,
    place: int,
    change: Callable[[Any], Any],
    message: str,
    found: str,
    allowed: str,
) -> None:
    """The kernels get addresses: what is not checked here is read past its end."""
    given = arguments(AttentionCase([20], [3], dims=SMALL), machine)
    given[place] = change(given[place])
    with pytest.raises(CudaError, match=message) as error:
        torch_cuda.latent_attention(machine.kernels, *given)
    assert (error.value.found or "").startswith(found)
    assert (error.value.allowed or "").startswith(allowed or machine.device.type)


def test_registering_needs_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda._runtime, "__file__", str(tmp_path / "_runtime.so"))
    with pytest.raises(CudaError, match="this installation has no CUDA kernels"):
        torch_cuda.register()


def saved(folder: Path, family: str, cache_format: str, **changes: Any) -> Path:
    """A random checkpoint with a recipe that names its cache."""
    model = random_model(family, yarn=False, q_lora=True, **changes)
    path = save_checkpoint(model, folder, None)
    config = json.loads((path / "config.json").read_text())
    config["mla_deploy"] = {"version": 1, "cache_format": cache_format}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("cache_format", ["fp32", "int4"])
def test_reference_modules_make_their_tensors_where_the_model_is(
    tmp_path: Path, family: str, cache_format: str
) -> None:
    """On the device `meta`, where torch only follows types, shapes and devices."""
    config = load_config(saved(tmp_path, family, cache_format, moe=True))
    model = build(config).to("meta")
    ids = torch.zeros((2, 70), dtype=torch.int64, device="meta")
    logits = forward_window(model, config, ids)
    assert logits.device.type == "meta"
    assert logits.shape == (2, 70, config.vocab_size)


@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
@pytest.mark.parametrize("cache_format", ["fp32", "int4", "int8", "fp16", "fp8", "int3"])
def test_the_definition_makes_its_tensors_where_its_inputs_are(
    cache_format: str, mode: str
) -> None:
    case = AttentionCase([20, 3], [3, 5], dims=SMALL, cache_format=cache_format)
    weights = (case.w_uk, case.w_uv, case.block_table, case.past, case.new)
    placed = [one.to("meta") for one in (*case.new_inputs(), *weights)]
    cache = [part.to("meta") for part in case.cache]
    settings = (cache_format, case.scale, case.epsilon, mode)
    output, present = attention.reference(*placed, cache, *settings)
    assert output.shape == (2, 5, 2 * 32)
    assert {one.device.type for one in (output, *present)} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("cache_format", ["fp32", "int4"])
def test_a_model_on_a_gpu_gives_the_logits_of_the_cpu(tmp_path: Path, cache_format: str) -> None:
    gpu_machine()
    sizes = {"kv_lora_rank": 256, "qk_rope_head_dim": 32, "v_head_dim": 24}
    path = saved(tmp_path, "deepseek_v2", cache_format, moe=False, **sizes)
    config, model = Checkpoint(path).config, load_model(path)
    ids = torch.randint(config.vocab_size, (2, 90))
    expected = forward_window(model, config, ids)
    torch_cuda.register()
    found = forward_window(model.cuda(), config, ids.cuda()).cpu()
    error = (found - expected).abs().amax(-1) / expected.abs().max()
    assert error.median() < (1e-4 if cache_format == "fp32" else 2e-2)
