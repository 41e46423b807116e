"""From what was measured of a layer to its converted attention: ours, and the published ways.

- `query-aware`: in a basis for each frequency, the channels keep their positions that would lose
  the most score power; the latent is the joint one that queries and output projection weigh.
- `mha2mla-S-joint`, `-split`: each key head keeps pairs of its own, chosen by S (`2norm`,
  `uniform`, `high`, `low`); SVD of the key and value weights, joined, or apart at half the rank.
- `transmla`: the first components over the heads of each frequency (RoRoPE, FreqFold) keep their
  positions; PCA of keys and values together, balanced by their norms.

MHA2MLA: arXiv 2502.14837. TransMLA: arXiv 2502.07864. Without calibration the inputs of a layer are
taken to be white.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from mla_deploy.quant.compress.basis import (
    Basis,
    query_aware_basis,
    selected_pairs_basis,
    uniform_distances,
)
from mla_deploy.quant.compress.latent import (
    Latent,
    LatentProblem,
    assemble,
    covariance,
    output_metric,
    query_metric,
    softmax_scale,
    split_latent,
    unweighted,
)
from mla_deploy.quant.compress.layer import LatentWeights, Weights
from mla_deploy.quant.compress.moments import Moments
from mla_deploy.quant.compress.source import SourceConfig

QUERY_AWARE = "query-aware"
TRANSMLA = "transmla"
SELECTIONS = ("2norm", "uniform", "high", "low")
METHODS = (
    QUERY_AWARE,
    *(f"mha2mla-{selection}-{kind}" for selection in SELECTIONS for kind in ("joint", "split")),
    TRANSMLA,
)
FOLDS = (1, 2, 4, 8)
"""Neighbouring frequencies that share a basis; TransMLA's FreqFold."""
GAMMAS = (1.0, 0.25, 0.5, 2.0, 4.0)
"""Equal traces first: that is what is taken where nothing can be tried."""


@dataclass(frozen=True)
class Steps:
    """The steps of the query-aware method, each of which an ablation can leave out."""

    queries: bool = True
    """Weigh the heads of a frequency by the queries that read them."""
    attention_distances: bool = True
    """Take distances as the heads attend to them, not as all pairs of tokens have them."""
    mean_rotation: bool = True
    """Multiply queries of channels without positions by their mean rotation."""
    centred: bool = True
    """Take means out of the latent."""
    query_metric: bool = True
    """Weigh errors of keys by the queries."""
    output_metric: bool = True
    """Weigh errors of values by the output projection."""
    folds: tuple[int, ...] = FOLDS
    """Neighbouring frequencies to treat as one, where not each can keep a channel; the best by
    layer output error."""
    gammas: tuple[float, ...] = GAMMAS
    """Weights of values against keys, relative to equal traces; likewise, at the best fold."""


@dataclass(frozen=True)
class Conversion:
    """A converted layer, and what the method says of it."""

    weights: LatentWeights
    rope_loss: float
    """Share of the score power that lost its positions; NaN where the method does not know."""
    rank_loss: float
    """Share of the variance, in the method's own metric, that the latent leaves out."""
    latent_power: float
    """E|c_kv|^2 on what was measured."""
    choices: dict[str, float] = field(default_factory=dict)
    """What was chosen by trial, by name."""


@dataclass(frozen=True)
class LayerTask:
    """A layer to convert."""

    config: SourceConfig
    weights: Weights
    inv_freq: torch.Tensor
    """[d / 2]."""
    moments: Moments
    """On the calibration text, or of white inputs."""
    white: Moments
    """Of white inputs."""
    distances: torch.Tensor | None
    """[H, T]: how far back each head attends; None: not measured."""
    window: int
    """T."""
    rank: int
    rope: int
    stock_frequencies: bool
    """Rotary channels have the frequencies of one head of size `rope`, as stock engines want."""
    error: Callable[[LatentWeights], float] | None
    """Relative squared error of the layer's attention output; None: nothing to try on."""


def convert_layer(task: LayerTask, method: str, steps: Steps | None = None) -> Conversion:
    """Convert by a method of `METHODS`."""
    if method == QUERY_AWARE:
        return _query_aware(task, steps or Steps())
    if method == TRANSMLA:
        return _transmla(task)
    _, selection, kind = method.split("-")
    return _mha2mla(task, selection, kind)


def _query_aware(task: LayerTask, steps: Steps) -> Conversion:
    distances = uniform_distances(task.window)
    if steps.attention_distances and task.distances is not None:
        distances = task.distances
    values = torch.eye(task.config.key_width, dtype=torch.float64)
    if steps.output_metric:
        values = output_metric(task.weights, task.config)

    @functools.cache
    def problem(fold: int) -> tuple[Basis, LatentProblem]:
        basis = query_aware_basis(
            task.moments,
            task.config,
            task.inv_freq,
            distances,
            task.rope,
            fold,
            one_per_block=task.stock_frequencies,
            mean_rotation=steps.mean_rotation,
            queries=steps.queries,
        )
        keys = torch.eye(len(basis.free_k), dtype=torch.float64)
        if steps.query_metric:
            keys = query_metric(basis, task.moments, softmax_scale(task.config))
        cov = covariance(basis, task.moments, centred=steps.centred)
        return basis, LatentProblem(basis, cov, keys, values)

    def candidate(fold: int, gamma: float) -> Conversion:
        basis, latents = problem(fold)
        latent = latents.solve(task.rank, gamma)
        choices = {"fold": float(fold), "gamma": gamma}
        return _finish(task, basis, latent, task.moments, choices, centred=steps.centred)

    # Where each frequency can keep a channel, folding was never chosen.
    folds = steps.folds if task.rope < task.config.head_dim else (1,)
    first = _best(task, (candidate(fold, steps.gammas[0]) for fold in _folds(task, folds)))
    fold = int(first.conversion.choices["fold"])
    # Without a free key there is nothing to weigh values against.
    others = steps.gammas[1:] if len(problem(fold)[0].free_k) else ()
    return _best(task, (candidate(fold, gamma) for gamma in others), first).conversion


def _mha2mla(task: LayerTask, selection: str, kind: str) -> Conversion:
    groups, m = task.config.num_key_value_heads, task.config.head_dim // 2
    pairs = task.rope // (2 * groups)
    kept = torch.zeros(groups, m, dtype=torch.bool)
    if selection == "2norm":
        best = task.moments.pair_scores.topk(pairs, dim=1).indices
        kept.scatter_(1, best, True)
    elif selection == "uniform":
        kept[:, torch.arange(pairs) * m // pairs] = True
    elif selection == "high":
        kept[:, :pairs] = True
    else:
        kept[:, m - pairs :] = True
    basis = selected_pairs_basis(task.config, task.inv_freq, kept)
    cov = covariance(basis, task.white, centred=True)  # W W^T; a bias is a mean
    if kind == "split":
        latent = split_latent(basis, cov, task.rank)
    else:
        latent = unweighted(basis, cov).solve(task.rank, balanced=False)
    return _finish(task, basis, latent, task.white, {}, centred=True)


def _transmla(task: LayerTask) -> Conversion:
    def candidate(fold: int) -> Conversion:
        basis = query_aware_basis(
            task.moments,
            task.config,
            task.inv_freq,
            uniform_distances(task.window),
            task.rope,
            fold,
            one_per_block=task.stock_frequencies,
            mean_rotation=False,
            queries=False,
        )
        cov = covariance(basis, task.moments, centred=False)
        latent = unweighted(basis, cov).solve(task.rank)
        choices = {"fold": float(fold)}
        return _finish(task, basis, latent, task.moments, choices, centred=False)

    return _best(task, (candidate(fold) for fold in _folds(task, FOLDS))).conversion


def _folds(task: LayerTask, folds: tuple[int, ...]) -> list[int]:
    if task.stock_frequencies:
        return [task.config.head_dim // task.rope]
    return [fold for fold in folds if fold <= task.config.head_dim // 2]


@dataclass(frozen=True)
class _Trial:
    conversion: Conversion
    error: float


def _best(task: LayerTask, candidates: Iterable[Conversion], best: _Trial | None = None) -> _Trial:
    """The least error on the layer's output, `best` included; without a sample the first."""
    for one in candidates:
        if task.error is None:
            return best or _Trial(one, float("inf"))
        error = task.error(one.weights)
        if best is None or error < best.error:
            best = _Trial(one, error)
    assert best is not None
    return best


def _finish(
    task: LayerTask,
    basis: Basis,
    latent: Latent,
    moments: Moments,
    choices: dict[str, float],
    *,
    centred: bool,
) -> Conversion:
    weights = assemble(basis, latent, moments, task.weights, task.config, centred=centred)
    down = torch.cat((latent.down_k, latent.down_v), dim=1)
    mean = task.moments.kv_mean
    power = float(((down @ (task.moments.kv - torch.outer(mean, mean))) * down).sum())
    return Conversion(weights, basis.rope_loss, latent.rank_loss, power, choices)


def method_rope_step(method: str, groups: int) -> int:
    """What `qk_rope_head_dim` must be a multiple of."""
    return 2 * groups if method.startswith("mha2mla") else 2
