"""Hidden states on their way through the layers, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from mla_deploy.errors import CheckpointError
from mla_deploy.output import whole_file
from mla_deploy.quant.compress.calibration import Windows
from mla_deploy.quant.compress.layer import (
    LatentWeights,
    Rotation,
    Weights,
    attention_output,
    feed_forward,
    queries_keys_values,
    rms_norm,
)
from mla_deploy.quant.compress.moments import Moments
from mla_deploy.quant.compress.source import Source, SourceConfig

_BATCH_TOKENS = 2048
_SAMPLE_TOKENS = 4096
"""On which candidates of a layer are tried, and distances of attention looked at."""
_LOGIT_ROWS = 512
_LOGIT_COLUMNS = 1 << 14


@dataclass
class Streams:
    """Hidden states [N, T, D] in front of a layer."""

    fitted: torch.Tensor
    """Of the source, on the windows that are fitted to."""
    held_out: torch.Tensor
    """Of the source, on the held-out windows."""
    converted: torch.Tensor
    """Of the converted model, on the held-out windows."""

    @classmethod
    def start(cls, source: Source, windows: Windows) -> Streams:
        """In front of the first layer."""
        table = source.read("model.embed_tokens.weight")
        held_out = table[windows.held_out].float()
        return cls(table[windows.fitted].float(), held_out, held_out.clone())

    def save(self, file: Path) -> None:
        """Whole or not at all."""
        with whole_file(file) as temporary:
            save_file(dict(vars(self)), temporary)

    @classmethod
    def load(cls, file: Path) -> Streams:
        """What `save` wrote."""
        with safe_open(file, framework="pt") as handle:
            return cls(**{name: handle.get_tensor(name).clone() for name in handle.keys()})  # noqa: SIM118


@dataclass
class Sample:
    """A few windows of a layer, to try candidates on."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    target: torch.Tensor
    """What the source's attention gives, [B, T, D]."""

    @torch.no_grad()
    def error(self, latent: LatentWeights) -> float:
        """Squared error of the attention output, relative to the output itself."""
        wrong = total = 0.0
        for one in range(len(self.q)):
            part = slice(one, one + 1)
            found = latent.attend(self.q[part], self.k[part], self.v[part])
            wrong += float((found - self.target[part]).square().sum())
            total += float(self.target[part].square().sum())
        return wrong / total if total > 0 else 0.0


class SourceLayer:
    """One layer of the source, on hidden states."""

    def __init__(self, config: SourceConfig, index: int, weights: Weights) -> None:
        self.config = config
        self.index = index
        self.weights = weights
        self.inv_freq = config.inverse_frequencies(index)

    def project(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of hidden states [B, T, D]."""
        x = rms_norm(h, self.weights["input_layernorm.weight"], self.config.rms_norm_eps)
        return queries_keys_values(x, self.weights, self.config)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The source's attention output."""
        return attention_output(q, k, v, self.weights, self._rotation(q.shape[2]))

    def finish(self, h: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output.

        Raises:
            CheckpointError: values that are not finite.
        """
        out = feed_forward(h + attended, self.weights, self.config.rms_norm_eps)
        if not bool(torch.isfinite(out).all()):
            raise CheckpointError(
                f"the layer {self.index} of the source gives values that are not finite",
                found=f"{int((~torch.isfinite(out)).sum())} of {out.numel()}",
                hint="check the source: it does not run either",
            )
        return out

    @torch.no_grad()
    def measure(self, h: torch.Tensor) -> tuple[Moments, torch.Tensor, Sample]:
        """Run the layer over all windows, in place of `h` [N, T, D].

        Returns:
            the moments, the distances that heads attend over [H, T], and windows to try on.
        """
        moments = Moments(self.config)
        length = h.shape[1]
        distances = torch.zeros(self.config.num_attention_heads, length, dtype=torch.float64)
        kept: list[tuple[torch.Tensor, ...]] = []
        wanted = max(1, _SAMPLE_TOKENS // length)
        for part in batches(len(h), length):
            q, k, v = self.project(h[part])
            attended = self.attend(q, k, v)
            moments.add(q, k, v)
            if len(kept) < wanted:
                for one in range(min(len(q), wanted - len(kept))):
                    kept.append((q[one], k[one], v[one], attended[one]))
                    distances += self._distances(q[one], k[one])
            h[part] = self.finish(h[part], attended)
        sample = Sample(*(torch.stack(parts) for parts in zip(*kept, strict=True)))
        return moments, distances / len(kept), sample

    @torch.no_grad()
    def measure_white(self) -> Moments:
        """Moments of inputs without any structure: E[x x^T] = 1, E[x] = 0, exactly."""
        moments = Moments(self.config)
        hidden = self.config.hidden_size
        for begin in range(0, hidden, _BATCH_TOKENS):
            rows = torch.arange(begin, min(begin + _BATCH_TOKENS, hidden))
            x = torch.zeros(1, len(rows), hidden)
            x[0, torch.arange(len(rows)), rows] = hidden**0.5
            for signed in (x, -x):
                moments.add(*queries_keys_values(signed, self.weights, self.config))
        return moments

    def _distances(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """How far back each head attends, on average over the tokens of a window.

        Shapes: q [H, T, d], k [G, T, d], to [H, T].
        """
        heads, length, _ = q.shape
        rotation = self._rotation(length)
        keys = rotation.halves(k).repeat_interleave(heads // len(k), dim=0)
        scores = rotation.halves(q) @ keys.transpose(1, 2) * self.config.head_dim**-0.5
        position = torch.arange(length)
        distance = position.unsqueeze(1) - position
        seen = distance >= 0
        p = torch.where(seen, scores, float("-inf")).softmax(-1)
        sums = torch.zeros(heads, length, dtype=torch.float64)
        sums.index_add_(1, distance[seen], p[:, seen].double())
        return sums / length

    def _rotation(self, length: int) -> Rotation:
        return Rotation.of(self.inv_freq, length, self.config.attention_scaling)


@torch.no_grad()
def advance(layer: SourceLayer, streams: Streams, latent: LatentWeights) -> float:
    """Take the held-out windows through the layer, of the source and converted.

    Returns:
        The squared error of the converted attention on the source's inputs, relative.
    """
    wrong = total = 0.0
    for part in batches(*streams.held_out.shape[:2]):
        h = streams.held_out[part]
        qkv = layer.project(h)
        expected = layer.attend(*qkv)
        wrong += float((latent.attend(*qkv) - expected).square().sum())
        total += float(expected.square().sum())
        streams.held_out[part] = layer.finish(h, expected)
    carry(layer, streams.converted, latent)
    return wrong / total if total > 0 else 0.0


@torch.no_grad()
def carry(layer: SourceLayer, h: torch.Tensor, latent: LatentWeights) -> None:
    """Take hidden states [N, T, D] through the converted layer, in place."""
    for part in batches(*h.shape[:2]):
        h[part] = layer.finish(h[part], latent.attend(*layer.project(h[part])))


def batches(windows: int, length: int) -> Iterator[slice]:
    """Slices of a few windows each."""
    step = max(1, _BATCH_TOKENS // length)
    return (slice(begin, begin + step) for begin in range(0, windows, step))


@dataclass(frozen=True)
class HeldOut:
    """The converted model against the source, on text that nothing was fitted to."""

    tokens: int
    loss: float
    """Cross-entropy of the source, nats a token."""
    converted_loss: float
    kl: float
    """From the source to the converted model, nats a token."""
    top1_agreement: float
    loss_by_quarter: tuple[float, ...]
    """Of the source, in the four quarters of a window: the longer the context, the lower."""
    converted_loss_by_quarter: tuple[float, ...]


@torch.no_grad()
def score(
    source: Source, of_source: torch.Tensor, of_converted: torch.Tensor, ids: torch.Tensor
) -> HeldOut:
    """Compare hidden states behind the last layer. Shapes: [N, T, D] twice, ids [N, T]."""
    norm = source.read("model.norm.weight").float()
    is_tied = source.config.tie_word_embeddings
    head = source.read("model.embed_tokens.weight" if is_tied else "lm_head.weight")
    epsilon = source.config.rms_norm_eps

    def logits(h: torch.Tensor) -> torch.Tensor:
        x = rms_norm(h, norm, epsilon)
        return torch.cat([F.linear(x, rows.float()) for rows in head.split(_LOGIT_COLUMNS)], dim=-1)

    expected, found = (h[:, :-1].flatten(0, 1) for h in (of_source, of_converted))
    targets = ids[:, 1:].flatten()
    loss, converted, kl = (torch.empty(len(targets)) for _ in range(3))
    agreed = 0
    for begin in range(0, len(targets), _LOGIT_ROWS):
        part = slice(begin, begin + _LOGIT_ROWS)
        log_q, log_p = (logits(h[part]).log_softmax(-1) for h in (expected, found))
        chosen = targets[part].unsqueeze(1)
        loss[part] = -log_q.gather(1, chosen).squeeze(1)
        converted[part] = -log_p.gather(1, chosen).squeeze(1)
        kl[part] = (log_q.exp() * (log_q - log_p)).sum(-1)
        agreed += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    length = ids.shape[1] - 1
    return HeldOut(
        tokens=len(targets),
        loss=float(loss.mean()),
        converted_loss=float(converted.mean()),
        kl=float(kl.mean().clamp_min(0)),
        top1_agreement=agreed / len(targets),
        loss_by_quarter=_quarters(loss.unflatten(0, (-1, length))),
        converted_loss_by_quarter=_quarters(converted.unflatten(0, (-1, length))),
    )


def _quarters(loss: torch.Tensor) -> tuple[float, ...]:
    """Shapes: loss [N, T - 1]."""
    return tuple(float(part.mean()) for part in loss.tensor_split(4, dim=1))
