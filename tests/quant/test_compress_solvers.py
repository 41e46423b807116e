"""Moments, bases and latents against what they stand for, computed in float64."""

from __future__ import annotations

import pytest
import torch

from mla_deploy.quant.compress.basis import Basis, mean_rotations, query_aware_basis
from mla_deploy.quant.compress.latent import LatentProblem, covariance, output_metric, query_metric
from mla_deploy.quant.compress.moments import Moments
from mla_deploy.quant.compress.source import SourceConfig, read_source_config
from mla_deploy.quant.compress.streams import SourceLayer

HEADS, GROUPS, D, TOKENS = 8, 4, 16, 48


RAW = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": D,
    "max_position_embeddings": 256,
}


def config() -> SourceConfig:
    return read_source_config(RAW, "config.json")


def correlated(heads: int) -> torch.Tensor:
    """Vectors [2, heads, TOKENS, D] that share directions over heads, and have a mean."""
    shared = torch.randn(2, 1, TOKENS, D) @ torch.randn(D, D) / 4
    return shared + torch.randn(2, heads, TOKENS, D) / 2 + torch.randn(heads, 1, D) / 4


def measured() -> tuple[SourceConfig, Moments, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = correlated(HEADS), correlated(GROUPS), correlated(GROUPS)
    moments = Moments(config())
    for part in (slice(0, 1), slice(1, 2)):
        moments.add(q[part], k[part], v[part])
    return config(), moments, q.double(), k.double(), v.double()


def turned(x: torch.Tensor, inv_freq: torch.Tensor, position: float) -> torch.Tensor:
    """The rotary positions of Llama, pair (f, f + d / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = (inv_freq.double() * position).cos(), (inv_freq.double() * position).sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def turned_neighbours(x: torch.Tensor, inv_freq: torch.Tensor, position: float) -> torch.Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (inv_freq.double() * position).cos(), (inv_freq.double() * position).sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def source_score(
    q: torch.Tensor, k: torch.Tensor, inv_freq: torch.Tensor, distance: float
) -> torch.Tensor:
    """Of every head, a query `distance` behind its key. Shapes: q [H, d], k [G, d], to [H]."""
    keys = k.repeat_interleave(HEADS // GROUPS, 0)
    return (turned(q, inv_freq, distance) * keys).sum(-1)


def basis_score(basis: Basis, q: torch.Tensor, k: torch.Tensor, distance: float) -> torch.Tensor:
    q_pe = torch.einsum("hrd,hd->hr", basis.rope_q, q)
    rotary = turned_neighbours(q_pe, basis.inv_freq, distance) @ (basis.rope_k @ k.flatten())
    free = torch.einsum("hnd,hd->hn", basis.free_q, q) @ (basis.free_k @ k.flatten())
    return rotary + free


def test_moments_are_those_of_the_vectors() -> None:
    _, moments, q, k, v = measured()
    y = torch.cat((k, v), dim=1).transpose(1, 2).flatten(2).flatten(0, 1)
    torch.testing.assert_close(moments.kv, y.T @ y / len(y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.kv_mean, y.mean(0), rtol=1e-4, atol=1e-5)
    expected = torch.einsum("bhtd,bhte->hde", q, q) / len(y)
    torch.testing.assert_close(moments.q, expected, rtol=1e-4, atol=1e-5)


def test_a_basis_changes_no_score_at_any_distance() -> None:
    settings, moments, q, k, _ = measured()
    inv_freq = settings.inverse_frequencies(0)
    uniform = torch.full((1, TOKENS), 1 / TOKENS, dtype=torch.float64)
    basis = query_aware_basis(moments, settings, inv_freq, uniform, GROUPS * D, 1)
    assert basis.free_k.shape == (0, GROUPS * D)
    for distance in (0, 1, 7, 100):
        found = basis_score(basis, q[0, :, 3], k[0, :, 5], distance)
        expected = source_score(q[0, :, 3], k[0, :, 5], inv_freq, distance)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fold", [1, 2])
def test_a_score_without_positions_is_its_mean_over_the_distances(fold: int) -> None:
    """Each head by its own distances."""
    settings, moments, q, k, _ = measured()
    inv_freq = settings.inverse_frequencies(0)
    distances = torch.rand(HEADS, TOKENS, dtype=torch.float64).softmax(-1)
    basis = query_aware_basis(moments, settings, inv_freq, distances, 0, fold)
    found = basis_score(basis, q[1, :, 9], k[1, :, 2], distance=0)
    every = [source_score(q[1, :, 9], k[1, :, 2], inv_freq, step) for step in range(TOKENS)]
    expected = (torch.stack(every, dim=1) * distances).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_channels_that_stay_are_those_that_would_lose_most() -> None:
    settings, moments, *_ = measured()
    inv_freq = settings.inverse_frequencies(0)
    near = torch.zeros(1, TOKENS, dtype=torch.float64)
    near[0, :3] = 1 / 3  # a slow channel loses nothing over three tokens
    basis = query_aware_basis(moments, settings, inv_freq, near, 16, 1)
    losses = [
        query_aware_basis(moments, settings, inv_freq, near, rope, 1).rope_loss
        for rope in (0, 8, 16, 32, 64)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    lost = 1 - mean_rotations(inv_freq, near).abs().square()
    assert basis.inv_freq.max() == pytest.approx(float(inv_freq.max()))
    assert lost[0].argmax() == 0


def test_distances_are_where_the_attention_goes() -> None:
    settings = config()
    layer = SourceLayer(settings, 0, {})
    q, k = correlated(HEADS)[0], correlated(GROUPS)[0]
    found = layer._distances(q, k)
    inv_freq = settings.inverse_frequencies(0)
    expected = torch.zeros(HEADS, TOKENS, dtype=torch.float64)
    for step in range(TOKENS):
        scores = torch.stack(
            [
                source_score(q[:, step].double(), k[:, t].double(), inv_freq, step - t)
                for t in range(step + 1)
            ]
        )
        p = (scores * D**-0.5).softmax(0)  # [t, H]
        expected[:, : step + 1] += p.flip(0).T / TOKENS
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_latent_is_the_best_of_its_rank() -> None:
    settings, moments, *_ = measured()
    uniform = torch.full((1, TOKENS), 1 / TOKENS, dtype=torch.float64)
    inv_freq = settings.inverse_frequencies(0)
    basis = query_aware_basis(moments, settings, inv_freq, uniform, 16, 1)
    cov = covariance(basis, moments, centred=True)
    o_proj = {"self_attn.o_proj.weight": torch.randn(96, HEADS * D) / 10}
    keys, values = query_metric(basis, moments, 0.25), output_metric(o_proj, settings)
    problem = LatentProblem(basis, cov, keys, values)
    n = len(keys)
    balance = float((keys * cov[:n, :n]).sum() / (values * cov[n:, n:]).sum())
    metric = torch.block_diag(keys, values * balance)
    to_y = torch.block_diag(basis.free_k, torch.eye(GROUPS * D, dtype=torch.float64))
    raw = torch.linalg.pinv(to_y)

    def error(down: torch.Tensor, up: torch.Tensor) -> float:
        """E of the weighted squared error of y = up down y."""
        left = torch.eye(len(cov), dtype=cov.dtype) - up @ down
        return float((metric @ left @ cov @ left.T).trace())

    whole = error(torch.zeros_like(cov), torch.zeros_like(cov))
    for rank in (1, 12, len(cov)):
        latent = problem.solve(rank)
        down = torch.cat((latent.down_k, latent.down_v), dim=1) @ raw
        up = torch.cat((latent.up_k, latent.up_v))
        assert error(down, up) / whole == pytest.approx(latent.rank_loss, abs=1e-3)
        if rank == 12:
            other = down + 0.1 * torch.randn_like(down) * down.std()
            # The best way back from another latent.
            back = cov @ other.T @ torch.linalg.pinv(other @ cov @ other.T)
            assert error(other, back) > error(down, up)
    assert latent.rank_loss < 1e-9
