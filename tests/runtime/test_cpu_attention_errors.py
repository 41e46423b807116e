"""What the native latent attention says to arguments and settings that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mla_deploy.runtime import _runtime

HEADS, NOPE, RANK, ROPE, VALUE = 2, 16, 64, 16, 16


def arguments(**changes: Any) -> dict[str, Any]:
    """A call of one sequence that works, with some arguments exchanged."""
    ones = np.ones((HEADS, NOPE, RANK), np.float32)
    call: dict[str, Any] = {
        "executor": _runtime.LatentAttentionExecutor(1),
        "q": np.ones((1, 2, HEADS * (NOPE + ROPE)), np.float32),
        "kv": np.ones((1, 2, RANK + ROPE), np.float32),
        "cos": np.ones((1, 2, ROPE // 2), np.float32),
        "sin": np.zeros((1, 2, ROPE // 2), np.float32),
        "weights": _runtime.LatentAttentionWeights(ones, ones.transpose(0, 2, 1).copy(), ROPE),
        "block_table": np.array([[1]]),
        "past_lengths": np.array([0]),
        "new_lengths": np.array([2]),
        "cache": [
            np.zeros((2, 64, RANK), np.float32),
            np.zeros((2, 64, ROPE), np.float32),
        ],
        "output": np.zeros((1, 2, HEADS * VALUE), np.float32),
        "cache_format": "fp32",
        "softmax_scale": 0.1,
    }
    return call | changes


def test_the_call_without_a_change_works() -> None:
    _runtime.latent_attention(**arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_lengths": np.array([3])}, r"new_lengths\[0\] is 3; allowed: 0 to steps = 2"),
        ({"past_lengths": np.array([63])}, r"holds 63 tokens and gets 2.*1 pages, 64 tokens"),
        ({"past_lengths": np.array([-1])}, r"holds -1 tokens"),
        ({"block_table": np.array([[2]])}, r"block_table\[0\]\[0\] is page 2.*2 pages"),
        ({"block_table": np.array([[-1]])}, r"is page -1"),
        ({"softmax_scale": 0.0}, r"softmax_scale is 0; allowed: finite and above 0"),
        ({"cache_format": "fp8"}, r"unknown cache format 'fp8'; allowed: int4, int8, fp16, fp32"),
        ({"cache_format": "int4"}, r"a int4 cache has 5 parts"),
        ({"cache_format": "fp16"}, r"c_kv must be contiguous"),
        ({"mode": "fast"}, r"unknown mode 'fast'; allowed: auto, absorbed, expanded"),
        (
            {"kv": np.ones((1, 2, 3), np.float32)},
            r"kv has shape \[1, 2, 3\]; expected \[1, 2, 80\]",
        ),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    call = arguments(**changes)
    before = [part.copy() for part in call["cache"]]
    with pytest.raises(ValueError, match=message):
        _runtime.latent_attention(**call)
    for part, copy in zip(call["cache"], before, strict=True):
        assert np.array_equal(part, copy), "the cache was touched"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((HEADS, NOPE, 40), "kv_lora_rank is 40; allowed: a multiple of 16, 16 to 1024"),
        ((200, NOPE, RANK), "heads is 200; allowed: 1 to 128"),
        ((HEADS, 2000, RANK), "qk_nope_head_dim is 2000; allowed: 1 to 1024"),
    ],
)
def test_weights_that_no_kernel_takes(shape: tuple[int, int, int], message: str) -> None:
    heads, nope, rank = shape
    with pytest.raises(ValueError, match=message):
        _runtime.LatentAttentionWeights(
            np.ones((heads, nope, rank), np.float32),
            np.ones((heads, rank, VALUE), np.float32),
            ROPE,
        )


def test_an_instruction_set_that_is_unknown_or_missing() -> None:
    with pytest.raises(RuntimeError, match="unknown instruction set 'sse9'; known: auto, portable"):
        _runtime.latent_attention(**arguments(isa="sse9"))
    missing = {"neon", "amx"} - set(_runtime.cpu_isas())
    for isa in missing:
        with pytest.raises(RuntimeError, match=f"'{isa}' is not available.*fastest available"):
            _runtime.latent_attention(**arguments(isa=isa))


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("portable", ""),
        ("sse9", "MLA_CPU_ISA='sse9' names no instruction set; known: auto"),
        ("neon_i8mm", r"(from MLA_CPU_ISA) is not available"),
    ],
)
def test_the_environment_forces_an_instruction_set(forced: str, message: str) -> None:
    if forced in _runtime.cpu_isas() and message:
        pytest.skip(f"{forced} works here")
    code = (
        "import runpy; from mla_deploy.runtime import _runtime\n"
        f"ns = runpy.run_path({__file__!r})\n"
        "_runtime.latent_attention(**ns['arguments']())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MLA_CPU_ISA": forced},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (message == ""), done.stderr
    assert message in done.stderr


def test_the_workspace_stays_as_it_is_from_call_to_call() -> None:
    call = arguments()
    _runtime.latent_attention(**call)
    held = call["executor"].nbytes
    assert held > 0
    for _ in range(3):
        _runtime.latent_attention(**call)
    assert call["executor"].nbytes == held
