"""The latent: what free key channels and values have in common, in as few numbers as asked for.

With y = [k_c; v], of covariance C, and a metric L in which errors of y weigh what they do to the
layer's output, the best r numbers are `U^T L y` with U the top eigenvectors of `L C L^T`, and y is
read back by `L^-1 U`. The weight-only SVD of MHA2MLA is C = W W^T, L = 1; TransMLA's is the true C
with one factor for all keys; ours is

    L = blkdiag(Gamma_k^1/2, gamma^1/2 Gamma_v^1/2),
    Gamma_k = softmax_scale^2 sum_h E[w_h w_h^T],   Gamma_v = blkdiag_g sum_h W_O,h^T W_O,h,

the error of the scores over all queries, and of the output over all values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_deploy.quant.compress.basis import Basis
from mla_deploy.quant.compress.layer import LatentWeights, Weights
from mla_deploy.quant.compress.moments import Moments
from mla_deploy.quant.compress.source import SourceConfig

_DAMPING = 1e-5
"""Of a metric's eigenvalues, relative to their mean."""


@dataclass(frozen=True)
class Latent:
    """The maps into the latent and out of it."""

    down_k: torch.Tensor
    """[r, G d]: from the source's keys."""
    down_v: torch.Tensor
    """[r, G d]: from the source's values."""
    up_k: torch.Tensor
    """[n, r]: to the free channels."""
    up_v: torch.Tensor
    """[G d, r]: to the values."""
    rank_loss: float
    """Share of the weighted variance that the latent does not hold."""

    @property
    def rank(self) -> int:
        return self.down_k.shape[0]

    def joined(self, other: Latent, share: float) -> Latent:
        """Two latents side by side; `share` of the variance was this one's."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("down_k", "down_v"))
        down_k, down_v = (torch.cat(pair) for pair in pairs)
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("up_k", "up_v"))
        up_k, up_v = (torch.cat(pair, dim=1) for pair in pairs)
        loss = share * self.rank_loss + (1 - share) * other.rank_loss
        return Latent(down_k, down_v, up_k, up_v, loss)


def query_metric(basis: Basis, moments: Moments, scale: float) -> torch.Tensor:
    """Gamma_k. Shapes: to [n, n]."""
    return (
        scale**2
        * torch.einsum("hnd,hde,hme->nm", basis.free_q, moments.q, basis.free_q).contiguous()
    )


def output_metric(weights: Weights, config: SourceConfig) -> torch.Tensor:
    """Gamma_v. Shapes: to [G d, G d]."""
    groups, d = config.num_key_value_heads, config.head_dim
    o = weights["self_attn.o_proj.weight"].double().unflatten(1, (groups, -1, d))  # [D, G, H/G, d]
    return torch.block_diag(*torch.einsum("Dghd,Dghe->gde", o, o))


def covariance(basis: Basis, moments: Moments, *, centred: bool) -> torch.Tensor:
    """Of y = [k_c; v]. Shapes: to [n + G d, n + G d]."""
    full = moments.kv
    if centred:
        full = full - torch.outer(moments.kv_mean, moments.kv_mean)
    width = full.shape[0] // 2
    to_y = torch.block_diag(basis.free_k, torch.eye(width, dtype=full.dtype))
    return to_y @ full @ to_y.T


class LatentProblem:
    """Which latent holds y = [k_c; v] best, in a metric; solved for several weights of the values.

    Shapes: cov [n + G d, n + G d], gamma_k [n, n], gamma_v [G d, G d].
    """

    def __init__(
        self, basis: Basis, cov: torch.Tensor, gamma_k: torch.Tensor, gamma_v: torch.Tensor
    ) -> None:
        self._free_k = basis.free_k
        self._root_k, self._inverse_k = _roots(gamma_k)
        self._root_v, self._inverse_v = _roots(gamma_v)
        root = torch.block_diag(self._root_k, self._root_v)
        self._weighted = root @ cov @ root
        n = len(gamma_k)
        of_keys, of_values = self._weighted[:n, :n].trace(), self._weighted[n:, n:].trace()
        self._equal_traces = float(of_keys / of_values) if of_keys > 0 < of_values else 1.0

    def solve(self, rank: int, gamma: float = 1.0, *, balanced: bool = True) -> Latent:
        """The best latent of `rank` numbers.

        Args:
            gamma: weight of the values' errors.
            balanced: relative to the weight at which keys and values count the same.
        """
        n = len(self._root_k)
        factor = (gamma * (self._equal_traces if balanced else 1.0)) ** 0.5
        scale = torch.ones(len(self._weighted), dtype=self._weighted.dtype)
        scale[n:] = factor
        variance, u = torch.linalg.eigh(scale.unsqueeze(1) * self._weighted * scale)
        variance, u = variance.flip(0).clamp_min(0), u.flip(1)[:, :rank]
        # The numbers of a latent are about 1, whatever the scales of keys and values.
        size = float(variance[:rank].mean().sqrt()) or 1.0
        total = float(variance.sum()) or 1.0
        return Latent(
            down_k=u[:n].T @ self._root_k @ self._free_k / size,
            down_v=u[n:].T @ self._root_v * (factor / size),
            up_k=self._inverse_k @ u[:n] * size,
            up_v=self._inverse_v @ u[n:] * (size / factor),
            rank_loss=float(variance[rank:].sum()) / total,
        )


def unweighted(basis: Basis, cov: torch.Tensor) -> LatentProblem:
    """All errors count the same."""
    n = len(basis.free_k)
    identity = torch.eye(len(cov), dtype=cov.dtype)
    return LatentProblem(basis, cov, identity[:n, :n], identity[n:, n:])


def split_latent(basis: Basis, cov: torch.Tensor, rank: int) -> Latent:
    """Keys and values each in half of the latent, unweighted."""
    n = len(basis.free_k)
    width = len(cov) - n
    for_keys = min(rank // 2, n)
    parts = []
    for only, numbers in ((slice(0, n), for_keys), (slice(n, n + width), rank - for_keys)):
        masked = torch.zeros_like(cov)
        masked[only, only] = cov[only, only]
        parts.append(unweighted(basis, masked).solve(numbers, balanced=False))
    share = float(cov[:n, :n].trace() / cov.trace().clamp_min(torch.finfo(cov.dtype).tiny))
    return parts[0].joined(parts[1], share)


def assemble(
    basis: Basis,
    latent: Latent,
    moments: Moments,
    weights: Weights,
    config: SourceConfig,
    *,
    centred: bool,
) -> LatentWeights:
    """The converted attention.

    A constant in the free keys of all tokens shifts every score of a query alike, which softmax
    does not see, so the mean of the keys is dropped; the mean of the values comes out as it went
    in, and moves to the bias of o_proj.
    """
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    mean = moments.kv_mean if centred else torch.zeros_like(moments.kv_mean)
    mean_k, mean_v = mean.chunk(2)
    group_of = torch.arange(heads) // (heads // groups)
    o_weight = weights["self_attn.o_proj.weight"]
    o_bias = o_weight.double() @ mean_v.unflatten(0, (groups, d))[group_of].flatten()
    if (source_bias := weights.get("self_attn.o_proj.bias")) is not None:
        o_bias = o_bias + source_bias.double()
    up_v = latent.up_v.unflatten(0, (groups, d))[group_of]  # [H, d, r]
    return LatentWeights(
        inv_freq=basis.inv_freq.float(),
        rope_q=basis.rope_q.float(),
        rope_k=basis.rope_k.float(),
        down_k=latent.down_k.float(),
        down_v=latent.down_v.float(),
        latent_bias=-(latent.down_k @ mean_k + latent.down_v @ mean_v).float(),
        w_uk=(basis.free_q.transpose(1, 2) @ latent.up_k).float(),
        w_uv=up_v.transpose(1, 2).float(),
        o_weight=o_weight,
        o_bias=o_bias.float(),
        softmax_scale=softmax_scale(config),
    )


def softmax_scale(config: SourceConfig) -> float:
    """Of the source's scores. Under YaRN cos and sin are scaled, on both sides, and so is what has
    lost its rotation."""
    return config.head_dim**-0.5 * config.attention_scaling**2


def _roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of a metric, damped, and its inverse."""
    if not metric.numel():
        return metric, metric
    values, vectors = torch.linalg.eigh(metric)
    floor = _DAMPING * float(values.clamp_min(0).mean()) or torch.finfo(metric.dtype).tiny
    roots = (values.clamp_min(0) + floor).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
