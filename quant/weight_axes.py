"""Balanced axes of the latent without a text: from the weights alone.

The calibrated axes need the second moments of the latent. Inputs of attention come out of a norm,
so that their coordinates before its gamma are about equally large; taken as independent, the latent
`W_kv_a diag(gamma) x` has the moments `W_kv_a diag(gamma)^2 W_kv_a^T`, up to a factor that does not
matter. The sensitivity is of the weights anyway.
"""

from __future__ import annotations

import torch

from mla_deploy.checkpoint import Checkpoint
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.base import Block
from mla_deploy.modules.decoder import DecoderLayer
from mla_deploy.quant.fold import LatentRotation, balanced_axes, latent_sensitivity


def weight_rotation(checkpoint: Checkpoint, layer: DecoderLayer, block: int) -> LatentRotation:
    """Balanced axes, then Hadamard blocks, for a layer of an unquantised checkpoint.

    Args:
        layer: of the unquantised model; needs no storage.
        block: of the Hadamard matrices.
    """
    attention = layer.self_attn
    assert isinstance(attention, LatentAttention)

    def read(module: Block, name: str) -> torch.Tensor:
        return torch.cat(list(module.sources[name].slabs(checkpoint.read))).float()

    w_uk, w_uv = read(attention, "w_uk"), read(attention, "w_uv")
    rank = w_uk.shape[2]
    gamma = read(layer.input_layernorm, "weight")
    covariance = torch.zeros(rank, rank)
    for _, linear, first in attention.latent_writers():
        latent = read(linear, "weight")[first : first + rank]
        if linear is attention.qkv_a_proj:  # another writer's inputs have a norm of their own
            latent = latent * gamma
        covariance += latent @ latent.T
    sensitivity = latent_sensitivity(w_uk, w_uv, read(attention.o_proj, "weight"))
    return LatentRotation(block, balanced_axes(covariance, sensitivity))
