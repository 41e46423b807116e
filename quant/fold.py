"""Changes of the attention weights that cost nothing at run time and change no result.

The latent is `c = RMSNorm(W_kv_a x)`, times gamma, and is read by `W_kv_b`. Two things move from
the latent into the weights, so that what is cached quantises well:

- gamma into the columns of `W_kv_b`: the cached latent then has unit RMS;
- an orthogonal matrix R between both: `W_kv_a -> R W_kv_a`, `W_kv_b -> W_kv_b R^T`. RMSNorm without
  gamma commutes with R because R keeps the norm. R is block-diagonal with Hadamard blocks, aligned
  with the groups of the cache record, so that an outlier channel is shared out over its group.
"""

from __future__ import annotations

import torch

LARGEST_BLOCK = 64
"""The group of the cache record: a rotation across groups would spread outliers further, but not
lower a group's peak below that of a full group."""


def hadamard_block(rank: int) -> int:
    """The largest power of two up to `LARGEST_BLOCK` that divides the rank; 1 rotates nothing."""
    return min(LARGEST_BLOCK, rank & -rank)


def rotate_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply each block of neighbours along the last axis by the orthonormal Hadamard matrix.

    The matrix is symmetric and its own inverse, so this is `x R`, `x R^T` and their inverse.

    Shapes: x [..., n * block], to the same, in float32.
    """
    blocks = x.float().unflatten(-1, (-1, block))
    return (blocks @ _hadamard(block)).flatten(-2)


def fold_kv_a(weight: torch.Tensor, rank: int, block: int) -> torch.Tensor:
    """`kv_a_proj_with_mqa` with its latent rows rotated; the rope rows stay.

    Shapes: weight [rank + rope, hidden], or its bias [rank + rope], to the same, in float32.
    """
    rows = weight.float().movedim(0, -1)
    latent = rotate_blocks(rows[..., :rank], block)
    return torch.cat((latent, rows[..., rank:]), dim=-1).movedim(-1, 0).contiguous()


def fold_kv_b(weight: torch.Tensor, gamma: torch.Tensor | None, block: int | None) -> torch.Tensor:
    """`kv_b_proj` with the gamma of the latent's norm in its columns, and these rotated.

    Shapes: weight [heads * (nope + v), rank], gamma [rank], to the shape of weight, in float32.
    """
    folded = weight.float()
    if gamma is not None:
        folded = folded * gamma.float()
    return folded if block is None else rotate_blocks(folded, block)


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction, orthonormal. Shapes: [size, size]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5
