"""One layer in torch: as it is in the source, and its attention once converted.

Both compute in float32 and can be differentiated. A layer's weights are a plain dict, by the names
in the checkpoint without the layer's prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mla_deploy.quant.compress.source import Source, SourceConfig, layer_shapes

Weights = Mapping[str, torch.Tensor]


def load_layer(source: Source, layer: int) -> dict[str, torch.Tensor]:
    """The weights of a layer in float32.

    Raises:
        CheckpointError: a tensor with values that are not finite.
    """
    prefix = f"model.layers.{layer}."
    return {
        name: source.read(prefix + name, shape).float()
        for name, shape in layer_shapes(source.config, layer).items()
    }


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the positions. Shapes: [T, pairs]."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, inv_freq: torch.Tensor, tokens: int, scaling: float = 1.0) -> Rotation:
        """Of the positions 0 to `tokens` - 1."""
        position = torch.arange(tokens, dtype=torch.float32, device=inv_freq.device)
        angle = position.unsqueeze(1) * inv_freq
        return cls(angle.cos() * scaling, angle.sin() * scaling)

    def halves(self, x: torch.Tensor) -> torch.Tensor:
        """Pairs (f, f + d / 2), as Llama has them. Shapes: [..., T, d] to the same."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), dim=-1)

    def neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """Pairs (2 f, 2 f + 1), as the converted model has them. Shapes: as `halves`."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * self.cos - b * self.sin, a * self.sin + b * self.cos), dim=-1)
        return turned.flatten(-2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Over the last axis."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def queries_keys_values(
    x: torch.Tensor, weights: Weights, config: SourceConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before the rotary positions, after the norms where there are any.

    Shapes: x [B, T, D], to q [B, H, T, d], k and v [B, G, T, d].
    """

    def project(kind: str) -> torch.Tensor:
        name = f"self_attn.{kind}_proj"
        flat = F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        by_head = flat.unflatten(-1, (-1, config.head_dim))
        norm = weights.get(f"self_attn.{kind}_norm.weight")
        if norm is not None:
            by_head = rms_norm(by_head, norm, config.rms_norm_eps)
        return by_head.transpose(1, 2)

    return project("q"), project("k"), project("v")


def attention_output(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: Weights, rotation: Rotation
) -> torch.Tensor:
    """Causal attention and o_proj. Shapes: as `queries_keys_values`, to [B, T, D]."""
    mixed = F.scaled_dot_product_attention(
        rotation.halves(q), rotation.halves(k), v, is_causal=True, enable_gqa=True
    )
    return F.linear(
        mixed.transpose(1, 2).flatten(2),
        weights["self_attn.o_proj.weight"],
        weights.get("self_attn.o_proj.bias"),
    )


def feed_forward(h: torch.Tensor, weights: Weights, epsilon: float) -> torch.Tensor:
    """What comes behind the attention, the residual included. Shapes: [B, T, D] to the same."""
    x = rms_norm(h, weights["post_attention_layernorm.weight"], epsilon)
    gate = F.silu(F.linear(x, weights["mlp.gate_proj.weight"]))
    inner = gate * F.linear(x, weights["mlp.up_proj.weight"])
    return h + F.linear(inner, weights["mlp.down_proj.weight"])


@dataclass
class LatentWeights:
    """The attention of a converted layer, in float32.

    With y = [k; v] the source's keys and values (all heads, [2 G d]), a token caches
    `c_kv = down_k k + down_v v + latent_bias` and the rotated `k_pe = rope_k k`. Biases of the
    source are in k and v.
    """

    inv_freq: torch.Tensor
    """[R / 2]."""
    rope_q: torch.Tensor
    """[H, R, d]: a head's q to its q_pe."""
    rope_k: torch.Tensor
    """[R, G d]."""
    down_k: torch.Tensor
    """[r, G d]."""
    down_v: torch.Tensor
    """[r, G d]."""
    latent_bias: torch.Tensor
    """[r]."""
    w_uk: torch.Tensor
    """[H, d, r]."""
    w_uv: torch.Tensor
    """[H, r, d]."""
    o_weight: torch.Tensor
    """[D, H d]."""
    o_bias: torch.Tensor
    """[D]."""
    softmax_scale: float

    def tensors(self) -> dict[str, torch.Tensor]:
        """By field."""
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What the converted attention makes of the source's queries, keys and values.

        Shapes: as `queries_keys_values`, to [B, T, D].
        """
        flat_k, flat_v = (x.transpose(1, 2).flatten(2) for x in (k, v))  # [B, T, G d]
        c_kv = flat_k @ self.down_k.T + flat_v @ self.down_v.T + self.latent_bias  # [B, T, r]
        rotation = Rotation.of(self.inv_freq, q.shape[2])
        k_pe = rotation.neighbours(flat_k @ self.rope_k.T)  # [B, T, R]
        q_pe = rotation.neighbours(q @ self.rope_q.transpose(1, 2))  # [B, H, T, R]
        q_latent = q @ self.w_uk  # [B, H, T, r]
        mixed = F.scaled_dot_product_attention(
            torch.cat((q_latent, q_pe), dim=-1),
            torch.cat((c_kv, k_pe), dim=-1).unsqueeze(1).expand(-1, q.shape[1], -1, -1),
            c_kv.unsqueeze(1).expand(-1, q.shape[1], -1, -1),
            is_causal=True,
            scale=self.softmax_scale,
        )
        values = mixed @ self.w_uv  # [B, H, T, d]
        return F.linear(values.transpose(1, 2).flatten(2), self.o_weight, self.o_bias)
