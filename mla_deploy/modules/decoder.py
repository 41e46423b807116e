"""The decoder: prologue, layers, epilogue, and the whole of them."""

from __future__ import annotations

import torch
from torch import nn

from mla_deploy.config import MlaConfig
from mla_deploy.modules.attention import LatentAttention
from mla_deploy.modules.base import Block
from mla_deploy.modules.linear import Embedding, Linear, Norm, Piece
from mla_deploy.rope import cos_sin_scale, inverse_frequencies


class Prologue(Block):
    """Embeds the new tokens and turns their positions into cos and sin."""

    inv_freq: torch.Tensor

    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            "model.embed_tokens",
            config.recipe.embedding,
            config.recipe.table_dtype,
        )
        self.embedding_scale = config.embedding_scale
        self.scale = cos_sin_scale(config.rope)
        self.register_buffer("inv_freq", inverse_frequencies(config.rope, config.qk_rope_head_dim))

    def forward(
        self, input_ids: torch.Tensor, past_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Shapes: input_ids [B, S], past_lengths [B], to x [B, S, hidden]; cos, sin [B, S, R/2]."""
        step = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        position = (past_lengths.unsqueeze(1) + step).float()
        angle = position.unsqueeze(2) * self.inv_freq
        x = _scaled(self.embed_tokens(input_ids), self.embedding_scale)
        return x, angle.cos() * self.scale, angle.sin() * self.scale


class DecoderLayer(Block):
    """Attention and feed-forward, each behind a norm.

    `x` and `residual` [B, S, hidden] add up to the layer's input; the first layer has no residual.
    """

    def __init__(
        self,
        config: MlaConfig,
        prefix: str,
        attention: LatentAttention,
        mlp: nn.Module,
        *,
        is_first: bool,
    ) -> None:
        super().__init__()
        self.is_first = is_first
        self.input_layernorm = Norm(
            config.hidden_size, f"{prefix}.input_layernorm", config.rms_norm_eps
        )
        self.self_attn = attention
        self.post_attention_layernorm = Norm(
            config.hidden_size, f"{prefix}.post_attention_layernorm", config.rms_norm_eps
        )
        self.mlp = mlp

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        block_table: torch.Tensor,
        past_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        cache: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.after_add(x, residual)
        x, cache = self.self_attn(x, cos, sin, block_table, past_lengths, new_lengths, cache)
        x, residual = self.post_attention_layernorm.after_add(x, residual)
        return self.mlp(x), residual, cache


class Epilogue(Block):
    """Logits of the positions that are asked for."""

    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        lm_head_format = config.recipe.lm_head
        is_tied = config.tie_word_embeddings and lm_head_format is None
        name = "model.embed_tokens" if is_tied else "lm_head"
        self.logit_scale = config.logit_scale
        self.norm = Norm(config.hidden_size, "model.norm", config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, (Piece(name, config.vocab_size),), lm_head_format)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, logit_index: torch.Tensor
    ) -> torch.Tensor:
        """Shapes: x, residual [B, S, hidden], logit_index [B, L], to [B, L, vocab_size]."""
        sequence = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        hidden, _ = self.norm.after_add(x[sequence, logit_index], residual[sequence, logit_index])
        return self.lm_head(_scaled(hidden, self.logit_scale))


class Decoder(nn.Module):
    """The whole model, with the inputs and outputs of an exported graph (`mla_deploy.manifest`)."""

    def __init__(self, prologue: Prologue, layers: list[DecoderLayer], epilogue: Epilogue) -> None:
        super().__init__()
        self.prologue = prologue
        self.layers = nn.ModuleList(layers)
        self.epilogue = epilogue

    def forward(
        self,
        input_ids: torch.Tensor,
        past_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        block_table: torch.Tensor,
        logit_index: torch.Tensor,
        cache: list[list[torch.Tensor]],
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Logits [B, L, vocab_size] and the cache of every layer with the new tokens in it."""
        x, cos, sin = self.prologue(input_ids, past_lengths)
        residual = None
        new_cache = []
        for layer, parts in zip(self.layers, cache, strict=True):
            x, residual, parts = layer(
                x, residual, cos, sin, block_table, past_lengths, new_lengths, parts
            )
            new_cache.append(parts)
        return self.epilogue(x, residual, logit_index), new_cache


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1.0 else x * scale
