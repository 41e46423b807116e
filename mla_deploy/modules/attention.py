"""Multi-head latent attention with absorbed weights."""

from __future__ import annotations

import torch

from mla_deploy import ops
from mla_deploy.config import MlaConfig
from mla_deploy.modules.base import Block
from mla_deploy.modules.linear import Linear, Norm, Piece
from mla_deploy.rope import softmax_scale
from mla_deploy.sources import Stored, UpProjection

NO_NORM = -1.0
"""What `ops.latent_attention` takes for a latent without a norm."""


class LatentAttention(Block):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1).

        hidden -- qkv_a_proj --+-- q_a -- q_a_layernorm -- q_b_proj --+
                               |                                      +-- latent_attention -- o_proj
                               +-- [c_kv | k_pe] ---------------------+

    The first projections of query and latent read the same input and are one matrix. Without
    q_lora_rank the query comes straight out of it. The gamma of the latent's norm lives in w_uk and
    w_uv, so that what is cached has unit RMS.
    """

    def __init__(self, config: MlaConfig, prefix: str) -> None:
        super().__init__()
        recipe = config.recipe
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        bias = config.attention_bias
        q_rows = heads * (nope + rope)
        q_order, kv_order = (
            None if config.rope_interleave else (plain + rope, rope) for plain in (nope, rank)
        )
        kv_a = Piece(f"{prefix}.kv_a_proj_with_mqa", rank + rope, bias, kv_order)
        if config.q_lora_rank is None:
            q_a = Piece(f"{prefix}.q_proj", q_rows, bias and config.query_bias, q_order)
        else:
            q_a = Piece(f"{prefix}.q_a_proj", config.q_lora_rank, bias)
            self.q_a_layernorm = Norm(
                config.q_lora_rank, f"{prefix}.q_a_layernorm", config.latent_norm_eps
            )
            q_b = Piece(f"{prefix}.q_b_proj", q_rows, rotary_halves=q_order)
            self.q_b_proj = Linear(config.q_lora_rank, (q_b,), recipe.linear)
        self.qkv_a_proj = Linear(hidden, (q_a, kv_a), recipe.linear)
        self.o_proj = Linear(
            heads * v_dim, (Piece(f"{prefix}.o_proj", hidden, bias),), recipe.linear
        )
        self.has_q_lora = config.q_lora_rank is not None
        self.split = (q_a.rows, kv_a.rows)
        self.cache_format = recipe.cache_format
        self.latent_norm_epsilon = config.latent_norm_eps if config.has_latent_norm else NO_NORM
        self.softmax_scale = softmax_scale(config)
        self.mode = "auto"

        kv_b = Stored(f"{prefix}.kv_b_proj.weight", (heads * (nope + v_dim), rank))
        gamma = Stored(f"{prefix}.kv_a_layernorm.weight", (rank,))
        folded = recipe.gamma_folded or not config.has_latent_norm
        for name, shape, is_value in (
            ("w_uk", (heads, nope, rank), False),
            ("w_uv", (heads, rank, v_dim), True),
        ):
            source = UpProjection(kv_b, None if folded else gamma, heads, nope, is_value)
            self.declare(name, shape, source, recipe.table_dtype)

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
        """Shapes: x [B, S, hidden], to [B, S, hidden]; the rest as in `ops.latent_attention`."""
        q, kv = self.project(x)
        output, cache = ops.latent_attention(
            q,
            kv,
            cos,
            sin,
            self.w_uk,
            self.w_uv,
            block_table,
            past_lengths,
            new_lengths,
            cache,
            self.cache_format,
            self.softmax_scale,
            self.latent_norm_epsilon,
            self.mode,
        )
        return self.o_proj(output), cache

    def latent_writers(self) -> tuple[tuple[str, Linear, int], ...]:
        """What adds up to the latent and must meet a change of its basis.

        Each by its name in the checkpoint, the layer, and the row there at which its kv_lora_rank
        rows begin; in the checkpoint they come first.
        """
        return (("kv_a_proj_with_mqa", self.qkv_a_proj, self.split[0]),)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`q` and `kv` of `ops.latent_attention`. Shapes: x [B, S, hidden]."""
        q, kv = self.qkv_a_proj(x).split(self.split, dim=-1)
        if self.has_q_lora:
            q = self.q_b_proj(self.q_a_layernorm(q))
        return q, kv
