"""Which channels of the keys keep their rotary positions, and in what coordinates.

A rotary pair of a key is a complex number z = k[f] + i k[f + d/2], one for each key head, and the
same pair of a query is w; the score is Re(conj(w) z), and the positions turn z and w alike. Any
complex matrix applied to z over the heads of one frequency, with its inverse's adjoint applied to
w, commutes with that: `z' = M z`, `w' = M^-H w` give the same scores at all distances. A basis that
gathers what matters into few channels therefore costs nothing, and only then do channels lose their
positions.

A channel without positions cannot see the distance of query and key; the best constant in place of
the rotation e^(i theta distance) is its mean c, and what is lost is its share 1 - |c|^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_deploy.quant.compress.moments import Moments
from mla_deploy.quant.compress.source import SourceConfig

_DAMPING = 1e-4
"""Of query power, relative to its mean: a head that asks for nothing must not divide by zero."""


@dataclass(frozen=True)
class Basis:
    """Keys and queries in two parts: rotary channels, and free ones."""

    inv_freq: torch.Tensor
    """[R / 2]: of each pair of rotary channels."""
    rope_q: torch.Tensor
    """[H, R, d]: from a head's query."""
    rope_k: torch.Tensor
    """[R, G d]: from the keys of all heads."""
    free_q: torch.Tensor
    """[H, n, d], n = G d - R."""
    free_k: torch.Tensor
    """[n, G d]."""
    rope_loss: float
    """Share of the score power that free channels lose with their positions."""


def uniform_distances(tokens: int) -> torch.Tensor:
    """How often each distance occurs between a token and those it sees. Shapes: to [1, tokens]."""
    count = torch.arange(tokens, 0, -1, dtype=torch.float64)
    return (count / count.sum()).unsqueeze(0)


def mean_rotations(inv_freq: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """The mean of e^(-i theta distance), which a query's rotation relative to a key's comes to.

    Shapes: inv_freq [m], distances [H or 1, T], to [H or 1, m] complex.
    """
    steps = torch.arange(distances.shape[1], dtype=torch.float64)
    angle = steps.unsqueeze(1) * inv_freq.double()
    return distances.to(torch.complex128) @ torch.polar(torch.ones_like(angle), -angle)


def query_aware_basis(
    moments: Moments,
    config: SourceConfig,
    inv_freq: torch.Tensor,
    distances: torch.Tensor,
    rope: int,
    fold: int,
    *,
    one_per_block: bool = False,
    mean_rotation: bool = True,
    queries: bool = True,
) -> Basis:
    """The basis in which each frequency's channels matter in order, and the best of all kept.

    For one frequency, with S = E[z z^H] and D the power of the queries that read each head, the
    eigenvectors `D^1/2 S D^1/2 = V L V^H` give `z' = V^H D^1/2 z`, `w' = V^H D^-1/2 w`: channel j
    then carries the score power L_j.

    Args:
        inv_freq: of the source's pairs, [d / 2].
        distances: between queries and keys, by head or for all alike, [H or 1, T].
        rope: channels that keep their positions.
        fold: neighbouring frequencies that are treated as one (TransMLA's FreqFold).
        one_per_block: keep the best channel of every block of frequencies, at the first frequency
            of the block, which is what a config with one `rope_theta` can say.
        mean_rotation: put c in place of the rotation of a free channel, not 1.
        queries: weigh heads by the power of the queries that read them.
    """
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    m = d // 2
    means = mean_rotations(inv_freq, distances).expand(heads, m)
    keys = moments.kv[: groups * d, : groups * d].reshape(groups, 2, m, groups, 2, m)
    q_power = moments.q.diagonal(dim1=1, dim2=2).unflatten(1, (2, m)).sum(1)  # [H, m]
    group_power = q_power.unflatten(0, (groups, -1)).sum(1)  # [G, m]
    channels = [
        _block_channels(
            keys, group_power, q_power, means, inv_freq, slice(f, min(f + fold, m)), queries=queries
        )
        for f in range(0, m, fold)
    ]
    gain = torch.cat([one.gain for one in channels])
    power = torch.cat([one.power for one in channels])
    theta = torch.cat([one.theta for one in channels])
    kept = torch.zeros_like(gain, dtype=torch.bool)
    if one_per_block:
        kept[_best_of_each([one.gain for one in channels])] = True
        theta[kept] = inv_freq[::fold].double()
    else:
        kept[gain.argsort(descending=True, stable=True)[: rope // 2]] = True
    turned = means.conj() if mean_rotation else torch.ones_like(means)
    group_of = torch.arange(heads) // (heads // groups)
    k_maps = torch.cat([one.key_map for one in channels])  # [n, G, m]
    q_maps = torch.cat([one.query_map for one in channels])
    per_head = q_maps[:, group_of].transpose(0, 1)  # [H, n, m]
    return Basis(
        inv_freq=theta[kept],
        rope_q=_real_rows(per_head[:, kept]).flatten(-2),
        rope_k=_real_rows(k_maps[kept].transpose(0, 1)).permute(1, 0, 2, 3).flatten(1),
        free_q=_real_rows(per_head[:, ~kept] * turned.unsqueeze(1)).flatten(-2),
        free_k=_real_rows(k_maps[~kept].transpose(0, 1)).permute(1, 0, 2, 3).flatten(1),
        rope_loss=float(gain[~kept].sum() / power.sum()),
    )


def selected_pairs_basis(config: SourceConfig, inv_freq: torch.Tensor, kept: torch.Tensor) -> Basis:
    """Every head keeps pairs of its own, as they are (MHA2MLA). Shapes: kept [G, d / 2] bool."""
    heads, groups, m = config.num_attention_heads, config.num_key_value_heads, config.head_dim // 2
    unit = torch.eye(groups * m, dtype=torch.complex128).reshape(groups, m, groups, m)
    group_of = torch.arange(heads) // (heads // groups)

    def rows(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_map = unit[chosen]  # [n, G, m]
        q_map = k_map[:, group_of].transpose(0, 1)  # [H, n, m]
        keys = _real_rows(k_map.transpose(0, 1)).permute(1, 0, 2, 3).flatten(1)
        return _real_rows(q_map).flatten(-2), keys

    rope_q, rope_k = rows(kept)
    free_q, free_k = rows(~kept)
    frequencies = inv_freq.double().expand(groups, m)[kept]
    return Basis(frequencies, rope_q, rope_k, free_q, free_k, rope_loss=float("nan"))


def _best_of_each(gains: list[torch.Tensor]) -> torch.Tensor:
    """Indices, into all gains joined, of the largest of each."""
    sizes = torch.tensor([len(gain) for gain in gains])
    return torch.stack([gain.argmax() for gain in gains]) + sizes.cumsum(0) - sizes


@dataclass(frozen=True)
class _Channels:
    """The channels of one block of frequencies, all heads."""

    key_map: torch.Tensor
    """[n, G, m] complex."""
    query_map: torch.Tensor
    """[n, G, m] complex."""
    power: torch.Tensor
    """[n]: of the scores."""
    gain: torch.Tensor
    """[n]: the power lost without positions."""
    theta: torch.Tensor
    """[n]: the frequency that fits best."""


def _block_channels(
    keys: torch.Tensor,
    group_power: torch.Tensor,
    q_power: torch.Tensor,
    means: torch.Tensor,
    inv_freq: torch.Tensor,
    block: slice,
    *,
    queries: bool,
) -> _Channels:
    groups, m = group_power.shape
    aa = keys[:, 0, block, :, 0, block]
    bb = keys[:, 1, block, :, 1, block]
    ba = keys[:, 1, block, :, 0, block]
    ab = keys[:, 0, block, :, 1, block]
    width = aa.shape[1]
    size = groups * width
    s = torch.complex(aa + bb, ba - ab).reshape(size, size)
    if queries:
        d = group_power[:, block].reshape(size)
        d = d + _DAMPING * d.mean() + torch.finfo(d.dtype).tiny
    else:
        d = torch.ones(size, dtype=s.real.dtype)
    root = d.sqrt().to(s.dtype)
    power, v = torch.linalg.eigh(root.unsqueeze(1) * s * root)
    power, v = power.flip(0).clamp_min(0), v.flip(1)
    # Of a channel's queries, head h asks through the part of its own group.
    share = v.abs().square().reshape(groups, width, size)  # [G, F, n]
    heads_per_group = q_power.shape[0] // groups
    loss = (1 - means[:, block].abs().square()).clamp_min(0)  # [H, F]
    weight = q_power[:, block] / d.reshape(groups, width).repeat_interleave(heads_per_group, 0)
    if not queries:
        weight = torch.ones_like(weight) / heads_per_group
    lost = (weight * loss).unflatten(0, (groups, heads_per_group)).sum(1)  # [G, F]
    gain = power * torch.einsum("gf,gfn->n", lost, share)
    theta = torch.einsum("f,gfn->n", inv_freq[block].double(), share)
    key_map = torch.zeros(size, groups, m, dtype=s.dtype)
    query_map = torch.zeros_like(key_map)
    adjoint = v.mH
    key_map[:, :, block] = (adjoint * root).reshape(size, groups, width)
    query_map[:, :, block] = (adjoint / root).reshape(size, groups, width)
    return _Channels(key_map, query_map, power, gain, theta)


def _real_rows(maps: torch.Tensor) -> torch.Tensor:
    """Complex maps as real ones: rows real, imaginary, ...; columns a head's d channels.

    Shapes: [X, n, m] complex (X heads), to [X, 2 n, 2, m].
    """
    real = torch.stack((maps.real, -maps.imag), dim=-2)  # [X, n, 2, m]
    imaginary = torch.stack((maps.imag, maps.real), dim=-2)
    return torch.stack((real, imaginary), dim=2).flatten(1, 2)
