"""Healing: a few steps of training that mend what a conversion has lost.

First each layer for itself: its attention learns to give what the source's gives, on the source's
own inputs. Then the whole model: cross-entropy on text, and the Kullback-Leibler divergence to the
source, as in distillation. Only the attention is trained; everything else stays the source's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from mla_deploy.output import whole_file
from mla_deploy.quant.compress.layer import (
    LatentWeights,
    feed_forward,
    load_layer,
    queries_keys_values,
    rms_norm,
)
from mla_deploy.quant.compress.options import Precision
from mla_deploy.quant.compress.source import Source
from mla_deploy.quant.compress.streams import SourceLayer

_TRAINED = ("rope_q", "rope_k", "down_k", "down_v", "latent_bias", "w_uk", "w_uv", "o_weight")
_PROJECTIONS = tuple(f"self_attn.{kind}_proj.weight" for kind in "qkv")
_WARMUP = 0.05
_FINAL_RATE = 0.1
_BETAS = (0.9, 0.95)
_CLIP = 1.0


@dataclass(frozen=True)
class HealPlan:
    """How long and how to train."""

    windows: torch.Tensor
    """[N, T] int64."""
    match_tokens: int
    """For each layer by itself."""
    distil_tokens: int
    """For the whole model."""
    seed: int
    batch_tokens: int = 2048
    match_rate: float = 1e-3
    distil_rate: float = 3e-4
    kl_weight: float = 1.0
    """Of the divergence, beside the cross-entropy."""
    device: str = "cpu"
    precision: Precision = "fp32"
    save_every: int = 50
    """Steps between the states that an interrupted distillation goes on from."""

    def steps(self, tokens: int) -> int:
        """Steps that so many tokens are."""
        return math.ceil(tokens / self.batch_tokens)

    def batch(self, step: int, stage: int, available: int) -> torch.Tensor:
        """Which windows of `available` a step takes; the same whenever it is asked for.

        Args:
            stage: the layer, or -1 for the whole model.
        """
        seed = (self.seed * 1_000_003 + (stage + 1)) * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        count = max(1, self.batch_tokens // self.windows.shape[1])
        return torch.randint(available, (count,), generator=generator)


@dataclass(frozen=True)
class Curve:
    """Losses on the way."""

    tokens: list[int]
    loss: list[float]


def match_layer(
    layer: SourceLayer, inputs: torch.Tensor, latent: LatentWeights, plan: HealPlan
) -> tuple[LatentWeights, Curve]:
    """Train a layer's latent attention towards the source's.

    Args:
        inputs: of the layer, on the plan's windows, [N, T, D].

    Returns:
        The trained attention, and its relative squared error on the way.
    """
    trained = _trainable(latent, plan.device)
    parameters = [getattr(trained, name) for name in _TRAINED] + [trained.o_bias]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.match_rate, betas=_BETAS, weight_decay=0.0, eps=1e-10
    )
    steps = plan.steps(plan.match_tokens)
    curve = Curve([], [])
    for step in range(steps):
        _set_rate(optimizer, plan.match_rate, step, steps)
        with torch.no_grad():
            qkv = layer.project(inputs[plan.batch(step, layer.index, len(inputs))])
            target = layer.attend(*qkv).to(plan.device)
            qkv = tuple(part.to(plan.device) for part in qkv)  # type: ignore[assignment]
        with _autocast(plan):
            found = trained.attend(*qkv)
        loss = (found.float() - target).square().sum() / target.square().sum()
        _descend(optimizer, loss, parameters)
        curve.tokens.append((step + 1) * plan.batch_tokens)
        curve.loss.append(float(loss.detach()))
    return _detached(trained), curve


@dataclass
class Student:
    """A converted layer in training: its latent attention, and projections of its own."""

    latent: LatentWeights
    projections: dict[str, torch.Tensor]
    """By the names of the source's."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything, by name."""
        return {**self.latent.tensors(), **self.projections}

    def parameters(self) -> list[torch.Tensor]:
        """What is trained."""
        latent = [getattr(self.latent, name) for name in _TRAINED]
        return [*latent, self.latent.o_bias, *self.projections.values()]


def distil(
    source: Source,
    latents: list[LatentWeights],
    plan: HealPlan,
    state: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Student], Curve]:
    """Train all layers together, the source as the teacher; both are held in memory.

    Args:
        state: file from which an interrupted call goes on, and which it leaves behind.
        progress: called with steps done and steps in all.
    """
    config, device = source.config, plan.device
    weights = [
        {name: x.to(device) for name, x in load_layer(source, index).items()}
        for index in range(config.num_hidden_layers)
    ]
    layers = [SourceLayer(config, index, one) for index, one in enumerate(weights)]
    students = [
        Student(
            _trainable(latent, device),
            {name: one[name].clone().requires_grad_() for name in _PROJECTIONS},
        )
        for latent, one in zip(latents, weights, strict=True)
    ]
    table = source.read("model.embed_tokens.weight").float().to(device)
    is_tied = config.tie_word_embeddings
    head = table if is_tied else source.read("lm_head.weight").float().to(device)
    norm = source.read("model.norm.weight").float().to(device)
    parameters = [p for student in students for p in student.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.distil_rate, betas=_BETAS, weight_decay=0.0)
    steps = plan.steps(plan.distil_tokens)
    curve = Curve([], [])
    first = _load_state(state, parameters, optimizer, curve)

    def logits(ids: torch.Tensor, *, converted: bool) -> torch.Tensor:
        h = table[ids]
        for layer, student in zip(layers, students, strict=True):
            if converted:
                own = {**layer.weights, **student.projections}
                x = rms_norm(h, own["input_layernorm.weight"], config.rms_norm_eps)
                attended = student.latent.attend(*queries_keys_values(x, own, config))
            else:
                attended = layer.attend(*layer.project(h))
            h = feed_forward(h + attended, layer.weights, config.rms_norm_eps)
        return rms_norm(h, norm, config.rms_norm_eps) @ head.T

    for step in range(first, steps):
        _set_rate(optimizer, plan.distil_rate, step, steps)
        ids = plan.windows[plan.batch(step, -1, len(plan.windows))].to(device)
        with _autocast(plan):
            with torch.no_grad():
                expected = logits(ids, converted=False)
            found = logits(ids, converted=True)
        log_p, log_q = found.float().log_softmax(-1), expected.float().log_softmax(-1)
        kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
        entropy = F.nll_loss(log_p[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss = entropy + plan.kl_weight * kl
        _descend(optimizer, loss, parameters)
        curve.tokens.append((step + 1) * plan.batch_tokens)
        curve.loss.append(float(loss.detach()))
        if (step + 1) % plan.save_every == 0 or step + 1 == steps:
            _save_state(state, parameters, optimizer, curve)
        if progress is not None:
            progress(step + 1, steps)
    for student in students:
        student.latent = _detached(student.latent)
        student.projections = {n: x.detach().cpu() for n, x in student.projections.items()}
    return students, curve


def _trainable(latent: LatentWeights, device: str) -> LatentWeights:
    tensors = {name: x.detach().clone().to(device) for name, x in latent.tensors().items()}
    copy = LatentWeights(**tensors, softmax_scale=latent.softmax_scale)
    for name in (*_TRAINED, "o_bias"):
        getattr(copy, name).requires_grad_()
    return copy


def _detached(latent: LatentWeights) -> LatentWeights:
    tensors = {name: x.detach().cpu() for name, x in latent.tensors().items()}
    return LatentWeights(**tensors, softmax_scale=latent.softmax_scale)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Linear warm-up, then a cosine."""
    warm = max(1, round(_WARMUP * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - _FINAL_RATE) + _FINAL_RATE
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / warm) * cosine


def _descend(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: list[torch.Tensor]
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
    optimizer.step()


def _autocast(plan: HealPlan) -> torch.autocast:
    kind = torch.device(plan.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=plan.precision == "bf16")


def _save_state(
    file: Path, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, curve: Curve
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.value"] = parameter.detach().cpu()
        for name, value in optimizer.state[parameter].items():
            tensors[f"{index}.{name}"] = value.detach().cpu()
    tensors["curve.tokens"] = torch.tensor(curve.tokens)
    tensors["curve.loss"] = torch.tensor(curve.loss, dtype=torch.float64)
    with whole_file(file) as temporary:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary)


def _load_state(
    file: Path, parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, curve: Curve
) -> int:
    """Take up a saved state; gives the steps done."""
    if not file.exists():
        return 0
    with safe_open(file, framework="pt") as handle:
        names = set(handle.keys())
        for index, parameter in enumerate(parameters):
            with torch.no_grad():
                parameter.copy_(handle.get_tensor(f"{index}.value"))
            optimizer.state[parameter] = {
                name: handle.get_tensor(f"{index}.{name}").to(
                    parameter.device if name != "step" else "cpu"
                )
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{index}.{name}" in names
            }
        curve.tokens.extend(handle.get_tensor("curve.tokens").tolist())
        curve.loss.extend(handle.get_tensor("curve.loss").tolist())
    return len(curve.tokens)
