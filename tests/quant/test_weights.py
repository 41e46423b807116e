"""Matrices in the packed layout."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mla_deploy.quant.weights as weights
from mla_deploy.errors import CheckpointError, UsageError
from mla_deploy.packing import dequantize
from mla_deploy.quant.hqq import solve
from mla_deploy.quant.weights import possible_groups, quantize_matrix
from mla_deploy.recipe import WeightFormat

FORMATS = [
    WeightFormat(bits, group, zeros)
    for bits in (4, 8)
    for group in (32, 64, 128)
    for zeros in ("integer", "exact")
]


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_layout_reads_back(weight_format: WeightFormat, dtype: torch.dtype) -> None:
    matrix = (torch.randn(37, 256) * 0.05).to(dtype)
    found = quantize_matrix(matrix, weight_format)
    bits, groups = weight_format.bits, 256 // weight_format.group
    assert found.codes.shape == (37, 256 * bits // 8)
    assert found.scales.shape == found.zeros.shape == (37, groups)
    restored = dequantize(found.codes, found.scales, found.zeros, bits, torch.float32)
    error = float((restored - matrix.float()).square().sum())
    assert error == pytest.approx(found.squared_error, rel=1e-3)
    assert found.squared_sum == pytest.approx(float(matrix.float().square().sum()), rel=1e-4)
    assert found.squared_error < found.squared_sum * (0.015 if bits == 4 else 1e-4)


def test_groups_run_along_the_input() -> None:
    matrix = torch.randn(5, 128)
    matrix[:, 64:] *= 100  # groups across this border would lose the first half
    found = quantize_matrix(matrix, WeightFormat(4, 64))
    restored = dequantize(found.codes, found.scales, found.zeros, 4, torch.float32)
    small = (restored - matrix)[:, :64].square().sum() / matrix[:, :64].square().sum()
    assert float(small) < 0.015


@pytest.mark.parametrize("zeros", ["integer", "exact"])
def test_blocks_do_not_show(zeros: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(101, 128)
    monkeypatch.setattr(weights, "_BLOCK_VALUES", 7 * 128)
    found = quantize_matrix(matrix, WeightFormat(4, 64, zeros))
    whole = solve(matrix.reshape(-1, 64), 4, zeros)
    assert torch.equal(found.scales.reshape(-1, 1), whole.scale)
    assert torch.equal(found.zeros.reshape(-1, 1), whole.zero)
    assert found.squared_error == pytest.approx(float(whole.squared_error.sum()), rel=1e-5)


def test_the_number_of_threads_is_left_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        quantize_matrix(torch.randn(64, 64), WeightFormat(4, 64))
        assert weights._workers(3).submit(torch.get_num_threads).result() == 1
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_group_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UsageError) as error:
        quantize_matrix(torch.randn(4, 96), WeightFormat(4, 64))
    assert error.value.allowed == "32"
    with pytest.raises(UsageError, match="90 inputs") as error:
        quantize_matrix(torch.randn(4, 90), WeightFormat(4, 32))
    assert error.value.hint == "keep it in floating point"
    assert possible_groups(128) == (32, 64, 128)


def test_an_error_in_a_block_comes_out() -> None:
    matrix = torch.randn(300, 1024)
    matrix[250, 3] = 1e9
    with pytest.raises(CheckpointError, match="too large"):
        quantize_matrix(matrix, WeightFormat(4, 64))
