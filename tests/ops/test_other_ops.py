"""Shape functions agree with the ops, and quantised ops with their dequantised selves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mla_deploy import ops
from mla_deploy.packing import dequantize, pack, unpack


def quantised(*shape: int, bits: int, group: int = 32) -> list[torch.Tensor]:
    groups = (*shape[:-1], shape[-1] // group)
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    zeros = torch.randint(2**bits, groups, dtype=torch.uint8)
    return [pack(codes, bits), torch.rand(groups).half() / 50, zeros]


@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_undoes_pack(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 5, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_products_equal_dequantised_ones(bits: int) -> None:
    matrix = quantised(48, 64, bits=bits)
    dense = dequantize(*matrix, bits, torch.float32)
    x, bias = torch.randn(2, 3, 64), torch.randn(48)
    found = ops.linear_quantized(x, *matrix, bias, bits)
    torch.testing.assert_close(found, F.linear(x, dense, bias))
    ids = torch.randint(48, (2, 3))
    torch.testing.assert_close(ops.embedding_quantized(ids, *matrix, bits), dense[ids])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_experts_equal_dequantised_ones(bits: int) -> None:
    gate_up, down = quantised(6, 64, 96, bits=bits), quantised(6, 96, 32, bits=bits)
    x, selection, weights = torch.randn(2, 5, 96), torch.randn(10, 6), torch.rand(10, 6)
    dense = [dequantize(*one, bits, torch.float32) for one in (gate_up, down)]
    found = ops.moe_quantized(x, selection, weights, gate_up, down, 2, bits)
    torch.testing.assert_close(found, ops.moe(x, selection, weights, *dense, 2))


def test_experts_equal_the_definition() -> None:
    x, selection, weights = torch.randn(1, 4, 16), torch.randn(4, 3), torch.rand(4, 3)
    gate_up, down = torch.randn(3, 20, 16), torch.randn(3, 16, 10)
    found = ops.moe(x, selection, weights, gate_up, down, 2)[0]
    for t in range(4):
        expected = torch.zeros(16)
        for e in selection[t].topk(2).indices:
            gate, up = gate_up[e, 0::2] @ x[0, t], gate_up[e, 1::2] @ x[0, t]
            expected += weights[t, e] * (down[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(found[t], expected)


def test_shape_functions() -> None:
    x, weight = torch.randn(2, 3, 64), torch.rand(64)
    matrix = quantised(48, 64, bits=4)
    gate_up, down = quantised(4, 64, 64, bits=4), quantised(4, 64, 32, bits=4)
    selection = torch.randn(6, 4)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.rms_norm, (x, weight, 1e-6)),
        (ops.add_rms_norm, (x, x + 1, weight, 1e-6)),
        (ops.swiglu, (x,)),
        (ops.linear_quantized, (x, *matrix, None, 4)),
        (ops.embedding_quantized, (torch.tensor([[1, 2]]), *matrix, 4)),
        (ops.moe, (x, selection, selection, torch.randn(4, 128, 64), torch.randn(4, 64, 64), 2)),
        (ops.moe_quantized, (x, selection, selection, gate_up, down, 2, 4)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op._opoverload, arguments, test_utils="test_faketensor")
