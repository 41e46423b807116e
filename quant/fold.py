"""Changes of the attention weights that cost nothing at run time and change no result.

The latent is `c = RMSNorm(W_kv_a x)`, times gamma, and is read by `W_kv_b`. Two things move from
the latent into the weights, so that what is cached quantises well:

- gamma into the columns of `W_kv_b`: the cached latent then has unit RMS;
- an orthogonal matrix R between both: `W_kv_a -> R W_kv_a`, `W_kv_b -> W_kv_b R^T`. RMSNorm without
  gamma commutes with R because R keeps the norm. R ends in Hadamard blocks aligned with the groups
  of the cache record, so that an outlier channel is shared out over its group. Before them the
  latent is turned to `balanced_axes`, of the weights alone or of a calibration.

A diagonal scale cannot move: RMSNorm does not commute with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST_BLOCK = 64
"""The group of the cache record: a rotation across groups would spread outliers further, but not
lower a group's peak below that of a full group."""


@dataclass(frozen=True)
class LatentRotation:
    """An orthogonal change of the latent's basis."""

    block: int
    """Of the Hadamard matrices."""
    axes: torch.Tensor | None = None
    """[rank, rank] orthogonal, a row an axis, applied before the Hadamard blocks."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """`x R^T`, in float32. Shapes: x [..., rank], to the same."""
        x = x.float()
        return rotate_blocks(x if self.axes is None else x @ self.axes.T, self.block)


def balanced_axes(covariance: torch.Tensor, sensitivity: torch.Tensor) -> torch.Tensor:
    """Axes that make neighbours of like variance and like sensitivity.

    A group's rounding noise grows with the energy b_g of its directions, and the harm it does with
    their sensitivity a_g (both as shares of the whole). `sum a_g b_g` is small where directions of
    much energy and little sensitivity are together, at one end, and their opposites at the other:
    in the order of the eigenvectors of the difference of both matrices.

    Shapes: covariance, sensitivity [rank, rank], to the same, a row an axis, in falling order.
    """
    difference = _share(covariance) - _share(sensitivity)
    vectors = torch.linalg.eigh(difference.double()).eigenvectors
    return vectors.flip(1).T.float().contiguous()


def latent_sensitivity(
    w_uk: torch.Tensor, w_uv: torch.Tensor, o_proj: torch.Tensor
) -> torch.Tensor:
    """How much a change of the latent moves scores and output: both by their share.

    `sum_h w_uk_h^T w_uk_h` and `sum_h (w_uv_h w_o_h^T) (...)^T`, each over its trace.

    Shapes: w_uk [H, N, rank], w_uv [H, rank, V], o_proj [hidden, H * V], to [rank, rank].
    """
    by_head = o_proj.unflatten(1, (w_uv.shape[0], -1)).permute(1, 2, 0)  # [H, V, hidden]
    # Head by head, and w_o first by itself: all at once it would be [rank, H * hidden].
    value = sum(
        (up @ (o @ o.T) @ up.T for up, o in zip(w_uv, by_head, strict=True)),
        torch.zeros(w_uv.shape[1], w_uv.shape[1]),
    )
    key = w_uk.flatten(0, 1)  # [H * N, rank]
    both = [key.T @ key, value]
    return sum(map(_share, both), torch.zeros_like(both[0]))


def _share(moments: torch.Tensor) -> torch.Tensor:
    """Over its trace; nothing of nothing, as of matrices that are all zero."""
    return moments / moments.trace().clamp_min(torch.finfo(moments.dtype).tiny)


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


def fold_kv_a(weight: torch.Tensor, rank: int, rotation: LatentRotation) -> torch.Tensor:
    """`kv_a_proj_with_mqa` with its latent rows rotated; the rope rows stay.

    Shapes: weight [rank + rope, hidden], or its bias [rank + rope], to the same, in float32.
    """
    rows = weight.float().movedim(0, -1)
    latent = rotation.apply(rows[..., :rank])
    return torch.cat((latent, rows[..., rank:]), dim=-1).movedim(-1, 0).contiguous()


def fold_kv_b(
    weight: torch.Tensor, gamma: torch.Tensor | None, rotation: LatentRotation | None
) -> torch.Tensor:
    """`kv_b_proj` with the gamma of the latent's norm in its columns, and these rotated.

    Shapes: weight [heads * (nope + v), rank], gamma [rank], to the shape of weight, in float32.
    """
    folded = weight.float()
    if gamma is not None:
        folded = folded * gamma.float()
    return folded if rotation is None else rotation.apply(folded)


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction, orthonormal. Shapes: [size, size]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5
