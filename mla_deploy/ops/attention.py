"""Latent attention: everything between the projections into and out of MLA.

Notation of DeepSeek-V2 (arXiv 2405.04434): a token's cache holds the normalised latent `c_kv` and
the rotated key `k_pe` that all heads share. With `w_uk`, `w_uv` the two halves of `kv_b_proj`:

- absorbed: `score = (w_uk_h^T q_nope_h) . c_kv + q_pe_h . k_pe`, `o_h = w_uv_h^T sum_t p_t c_kv_t`,
  that is multi-query attention with keys of kv_lora_rank + qk_rope_head_dim;
- expanded: keys and values are rebuilt a head, then attention is the ordinary one.

Both give the same numbers up to rounding. Every new token is encoded into the cache first and read
back from it, so that a prompt gives the same result however it is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.library import custom_op

from mla_deploy.cache import CacheRecord, cache_record
from mla_deploy.errors import CheckpointError, UsageError
from mla_deploy.manifest import PAGE_TOKENS
from mla_deploy.ops.norm import normalize


@custom_op("mla_deploy::latent_attention", mutates_args=())
def latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    block_table: torch.Tensor,
    past_lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    cache: list[torch.Tensor],
    cache_format: str,
    softmax_scale: float,
    latent_norm_epsilon: float,
    mode: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Append S tokens to each of B sequences and attend to all of them, causally.

    B sequences, S new tokens (padded on the right), H heads, N = qk_nope_head_dim,
    R = qk_rope_head_dim, V = v_head_dim, M pages a sequence.

    Shapes:
        q [B, S, H * (N + R)]: a head's q_nope, then its q_pe, not yet rotated.
        kv [B, S, kv_lora_rank + R]: what kv_a_proj gives: the latent, then k_pe, not yet rotated.
        cos, sin [B, S, R / 2]: of the new tokens' positions; pairs are neighbours (interleaved).
        w_uk [H, N, kv_lora_rank], w_uv [H, kv_lora_rank, V]: the latent norm's gamma folded in.
        block_table [B, M] int64: pages of the arena; covers past_lengths + new_lengths tokens.
        past_lengths, new_lengths [B] int64: tokens in the cache, tokens of S that are real.
        cache: the record's parts, each [pages, *page_shape].

    Args:
        cache_format: the record's name.
        softmax_scale: multiplies the scores.
        latent_norm_epsilon: of the RMSNorm (without gamma) on the latent; negative: no norm.
        mode: "absorbed", "expanded", or "auto": the implementation chooses.

    Returns:
        output [B, S, H * V] and the cache with the new tokens in it. Rows of padded tokens hold
        finite values without a meaning.

    Raises:
        CheckpointError: latents that are not finite; no cache could hold them.
    """
    check_finite(kv)
    return reference(
        q,
        kv,
        cos,
        sin,
        w_uk,
        w_uv,
        block_table,
        past_lengths,
        new_lengths,
        cache,
        cache_format,
        softmax_scale,
        latent_norm_epsilon,
        mode,
    )


@latent_attention.register_fake
def _(
    q: torch.Tensor,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    block_table: torch.Tensor,
    past_lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    cache: list[torch.Tensor],
    cache_format: str,
    softmax_scale: float,
    latent_norm_epsilon: float,
    mode: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    heads, _, v_head_dim = w_uv.shape
    output = q.new_empty((q.shape[0], q.shape[1], heads * v_head_dim))
    return output, [torch.empty_like(part) for part in cache]


def check_finite(kv: torch.Tensor) -> None:
    """Raise a CheckpointError unless all latents are finite."""
    if not bool(kv.isfinite().all()):
        raise CheckpointError(
            "attention was given latents that are not finite",
            found=f"{int((~kv.isfinite()).sum())} of {kv.numel()} values",
            hint="look at the weights for NaN and overflow",
        )


def reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    block_table: torch.Tensor,
    past_lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    cache: Sequence[torch.Tensor],
    cache_format: str,
    softmax_scale: float,
    latent_norm_epsilon: float,
    mode: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`latent_attention` in plain torch; exporters trace it for targets without a kernel.

    It computes in float32 or wider, whatever comes in.
    """
    attend = {"absorbed": attend_absorbed, "expanded": attend_expanded, "auto": attend_absorbed}
    if mode not in attend:
        raise UsageError("unknown attention mode", found=mode, allowed=", ".join(attend))
    record = cache_record(cache_format)
    rank = w_uk.shape[2]
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    c_kv, k_pe = new_latents(kv.to(wide), cos, sin, rank, latent_norm_epsilon)
    new_cache = append(c_kv, k_pe, block_table, past_lengths, new_lengths, cache, record)
    c_kv, k_pe = read(block_table, new_cache, record, rank, kv.shape[2] - rank, wide)
    q_nope, q_pe = new_queries(q.to(wide), cos, sin, w_uk.shape[0], w_uk.shape[1])
    output = attend[mode](
        q_nope, q_pe, c_kv, k_pe, w_uk.to(wide), w_uv.to(wide), past_lengths, softmax_scale
    )
    return output.to(q.dtype), new_cache


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbouring pairs (Su et al., 2021).

    Shapes: x [..., R]; cos, sin [..., R / 2], broadcast over x's leading axes; to [..., R].
    """
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def new_latents(
    kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rank: int, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the new tokens put into the cache: c_kv [B, S, rank], k_pe [B, S, R]."""
    c_kv = kv[..., :rank]
    if epsilon >= 0:
        c_kv = normalize(c_kv, epsilon)
    return c_kv, rotate(kv[..., rank:], cos, sin)


def new_queries(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, nope: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q_nope [B, H, S, N] and the rotated q_pe [B, H, S, R]."""
    by_head = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    q_pe = rotate(by_head[..., nope:], cos.unsqueeze(1), sin.unsqueeze(1))
    return by_head[..., :nope], q_pe


def append(
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    block_table: torch.Tensor,
    past_lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    cache: Sequence[torch.Tensor],
    record: CacheRecord,
) -> list[torch.Tensor]:
    """The cache with the new tokens encoded into it; padded tokens go to the scratch page."""
    step = torch.arange(c_kv.shape[1], device=c_kv.device).unsqueeze(0)  # [1, S]
    is_real = step < new_lengths.unsqueeze(1)  # [B, S]
    position = torch.where(is_real, past_lengths.unsqueeze(1) + step, 0)
    page = torch.where(is_real, block_table.gather(1, position // PAGE_TOKENS), 0).flatten()
    slot = (position % PAGE_TOKENS).flatten()
    encoded = record.encode(c_kv.flatten(0, 1).float(), k_pe.flatten(0, 1).float())
    parts = record.parts(c_kv.shape[2], k_pe.shape[2])
    return [
        part.write(arena, page, slot, values)
        for part, arena, values in zip(parts, cache, encoded, strict=True)
    ]


def read(
    block_table: torch.Tensor,
    cache: Sequence[torch.Tensor],
    record: CacheRecord,
    rank: int,
    rope: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of the pages in the block table: c_kv [B, M * 64, rank], k_pe [B, M * 64, R]."""
    parts = record.parts(rank, rope)
    stored = [part.read(arena, block_table) for part, arena in zip(parts, cache, strict=True)]
    return record.decode(stored, dtype)


def attend_absorbed(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    past_lengths: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """Multi-query attention in the latent space; heads and tokens fold into one matrix axis.

    Shapes: q_nope [B, H, S, N], q_pe [B, H, S, R], c_kv [B, T, rank], k_pe [B, T, R], to
    [B, S, H * V].
    """
    heads, steps = q_nope.shape[1], q_nope.shape[2]
    q_latent = (q_nope @ w_uk).flatten(1, 2)  # [B, H * S, rank]
    scores = q_latent @ c_kv.transpose(1, 2) + q_pe.flatten(1, 2) @ k_pe.transpose(1, 2)
    scores = scores.unflatten(1, (heads, steps))  # [B, H, S, T]
    p = masked_softmax(scores, past_lengths, softmax_scale).flatten(1, 2)
    output = (p @ c_kv).unflatten(1, (heads, steps)) @ w_uv  # [B, H, S, V]
    return output.transpose(1, 2).flatten(2)


def attend_expanded(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    c_kv: torch.Tensor,
    k_pe: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    past_lengths: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """Ordinary attention on keys and values rebuilt a head. Shapes: as `attend_absorbed`."""
    k_nope = c_kv.unsqueeze(1) @ w_uk.transpose(1, 2)  # [B, H, T, N]
    value = c_kv.unsqueeze(1) @ w_uv  # [B, H, T, V]
    scores = q_nope @ k_nope.transpose(2, 3) + q_pe @ k_pe.unsqueeze(1).transpose(2, 3)
    output = masked_softmax(scores, past_lengths, softmax_scale) @ value
    return output.transpose(1, 2).flatten(2)


def masked_softmax(
    scores: torch.Tensor, past_lengths: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """Causal softmax: token s of a sequence sees its past and itself. Shapes: [B, H, S, T]."""
    steps, tokens = scores.shape[2], scores.shape[3]
    step = torch.arange(steps, device=scores.device).unsqueeze(0)
    last_seen = past_lengths.unsqueeze(1) + step  # [B, S]
    token = torch.arange(tokens, device=scores.device)
    visible = token <= last_seen.unsqueeze(2)  # [B, S, T]
    scores = torch.where(visible.unsqueeze(1), scores * softmax_scale, float("-inf"))
    return scores.softmax(dim=-1)
