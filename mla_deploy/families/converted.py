"""What `mla-deploy convert` makes of ordinary attention: MLA with a few freedoms more.

Beside DeepSeek's layout a converted model has

- frequencies of its own in every layer, `inv_freq` in config.json: the rotary channels are chosen
  by what each layer needs;
- no norm on the latent, which is a linear map of the source's keys and values;
- biases on `q_proj`, `kv_a_proj_with_mqa` and `o_proj` (`attention_bias`);
- in models such as Qwen3, the source's norms on queries and keys (`qk_norm`), behind which all is
  linear again.

The head size of the source is `qk_nope_head_dim`: a head's query is what it was, and its rotary
part stands behind it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mla_deploy.config import MlaConfig, read_common
from mla_deploy.config_reader import ConfigReader
from mla_deploy.errors import ConfigError
from mla_deploy.families.base import Family
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.linear import Linear, Norm, Piece
from mla_deploy.sources import Given, Stored

MODEL_TYPE = "mla_deploy"


class ConvertedAttention(LatentAttention):
    """Latent attention with frequencies of its own.

    With norms on queries and keys, `G` key heads and `d = qk_nope_head_dim`:

        q_h = RMSNorm(W_q,h x) [d],   q_pe,h = W_qr,h q_h [qk_rope_head_dim]
        [c_kv | k_pe] = W_kv_a x + W_k_latent [RMSNorm(W_k,g x)]_g
    """

    inv_freq: torch.Tensor
    w_qr: torch.Tensor

    def __init__(self, config: MlaConfig, layer: int, prefix: str) -> None:
        super().__init__(config, prefix)
        assert config.rope.inv_freq is not None
        frequencies = config.rope.inv_freq[layer]
        self.declare("inv_freq", (len(frequencies),), Given(frequencies))
        self.groups = config.qk_norm_groups
        if self.groups is None:
            return
        hidden, heads, head_dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.qk_nope_head_dim,
        )
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        has_bias = config.attention_bias
        q = Piece(f"{prefix}.q_proj", heads * head_dim, has_bias and config.query_bias)
        k = Piece(f"{prefix}.k_proj", self.groups * head_dim, has_bias and config.query_bias)
        kv_a = Piece(f"{prefix}.kv_a_proj_with_mqa", latent, has_bias)
        linear = config.recipe.linear
        self.qkv_a_proj = Linear(hidden, (q, k, kv_a), linear)
        self.split_all = (q.rows, k.rows, kv_a.rows)
        self.q_norm = Norm(head_dim, f"{prefix}.q_norm", config.rms_norm_eps)
        self.k_norm = Norm(head_dim, f"{prefix}.k_norm", config.rms_norm_eps)
        self.k_latent_proj = Linear(k.rows, (Piece(f"{prefix}.k_latent_proj", latent),), linear)
        shape = (heads, head_dim, config.qk_rope_head_dim)
        rotary = Stored(f"{prefix}.q_rope_proj.weight", shape)
        self.declare("w_qr", shape, rotary)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        block_table: torch.Tensor,
        past_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        cache: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As in the base, but for cos and sin: those of the shared frequencies are not used."""
        step = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        position = (past_lengths.unsqueeze(1) + step).float()
        angle = position.unsqueeze(2) * self.inv_freq
        return super().forward(
            x, angle.cos(), angle.sin(), block_table, past_lengths, new_lengths, cache
        )

    def latent_writers(self) -> tuple[tuple[str, Linear, int], ...]:
        if self.groups is None:
            return super().latent_writers()
        q_rows, k_rows, _ = self.split_all
        return (
            ("kv_a_proj_with_mqa", self.qkv_a_proj, q_rows + k_rows),
            ("k_latent_proj", self.k_latent_proj, 0),
        )

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.groups is None:
            return super().project(x)
        q, k, kv = self.qkv_a_proj(x).split(self.split_all, dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.w_qr.shape[0], -1)))  # [B, S, H, d]
        q_pe = (q.transpose(1, 2) @ self.w_qr).transpose(1, 2)  # [B, S, H, R]
        k = self.k_norm(k.unflatten(-1, (self.groups, -1))).flatten(-2)
        return torch.cat((q, q_pe), dim=-1).flatten(-2), kv + self.k_latent_proj(k)


class Converted(Family):
    """Dense throughout."""

    model_types = (MODEL_TYPE,)

    def read_config(self, keys: ConfigReader) -> MlaConfig:
        inv_freq = keys.get("inv_freq")
        groups = keys.integer("qk_norm_groups", 0)
        config = read_common(keys, moe=None)
        if config.q_lora_rank is not None:
            raise ConfigError(
                f"{keys.origin}: a converted model has no q_lora_rank",
                found=config.q_lora_rank,
                hint="convert the model again",
            )
        frequencies = _frequencies(inv_freq, config, keys.origin)
        return replace(
            config,
            rope=replace(config.rope, inv_freq=frequencies),
            has_latent_norm=False,
            query_bias=config.attention_bias,
            qk_norm_groups=groups or None,
        )

    def attention(self, config: MlaConfig, layer: int, prefix: str) -> LatentAttention:
        return ConvertedAttention(config, layer, prefix)


def _frequencies(raw: Any, config: MlaConfig, origin: str) -> tuple[tuple[float, ...], ...]:
    pairs = config.qk_rope_head_dim // 2
    layers = config.num_hidden_layers
    is_table = isinstance(raw, list) and len(raw) == layers
    if not is_table or not all(_is_row(row, pairs) for row in raw):
        raise ConfigError(
            f"{origin}: inv_freq is not a table of frequencies",
            found=type(raw).__name__ if not isinstance(raw, list) else f"{len(raw)} rows",
            allowed=f"{layers} rows of {pairs} numbers, one for each pair of rotary channels",
            hint="take config.json and the weights from the same conversion",
        )
    return tuple(tuple(float(value) for value in row) for row in raw)


def _is_row(row: Any, pairs: int) -> bool:
    if not isinstance(row, list) or len(row) != pairs:
        return False
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in row)
