"""The token windows that a conversion is measured on: from text files, or from the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from mla_deploy.errors import TokenizerError, UsageError
from mla_deploy.evaluate.text import encode_text, read_text
from mla_deploy.quant.compress.layer import (
    Rotation,
    Weights,
    feed_forward,
    load_layer,
    queries_keys_values,
    rms_norm,
)
from mla_deploy.quant.compress.source import Source
from mla_deploy.tokenizer import Tokenizer

MAX_HELD_OUT = 8192
"""Tokens that are held out at most."""
HELD_OUT_SHARE = 0.1
"""Of the windows; what is reported is measured on them and nothing is fitted to them."""
MIN_WINDOWS = 10
_SELF_BATCH = 16


@dataclass(frozen=True)
class Windows:
    """Windows of equal length. Shapes: [N, T] int64."""

    fitted: torch.Tensor
    held_out: torch.Tensor


def windows_from_text(
    source: Source, files: Sequence[Path], length: int, tokens: int, seed: int
) -> Windows:
    """Windows spread over the texts; the last tenth of each text is held out.

    Args:
        length: tokens of a window, the start token included.
        tokens: fitted to at most.

    Raises:
        UsageError: a text that cannot be read, or less text than `MIN_WINDOWS` windows.
        TokenizerError: no tokenizer, or one with tokens that the model does not know.
    """
    tokenizer = Tokenizer.open(source.path)
    fitted: list[torch.Tensor] = []
    held_out: list[torch.Tensor] = []
    found = 0
    for file in files:
        corpus = encode_text(tokenizer, read_text(file))
        found += len(corpus.ids)
        room = length - len(corpus.start)
        starts = torch.tensor(corpus.start, dtype=torch.int64)
        pieces = torch.tensor(corpus.ids).split(room)
        whole = [torch.cat((starts, piece)) for piece in pieces if len(piece) == room]
        kept = len(whole) - max(1, round(len(whole) * HELD_OUT_SHARE)) if whole else 0
        fitted += whole[:kept]
        held_out += whole[kept:]
    if len(fitted) + len(held_out) < MIN_WINDOWS:
        raise UsageError(
            "the calibration text is too short",
            found=f"{found:,} tokens",
            allowed=f"{MIN_WINDOWS * length:,} tokens or more: {MIN_WINDOWS} windows of {length}",
            hint="give more text, --calibration self, or a smaller --window to `convert`",
        )
    windows = Windows(
        _sample(fitted, tokens // length, seed),
        _sample(held_out, min(tokens, MAX_HELD_OUT) // length, seed),
    )
    _check_vocabulary(source, windows)
    return windows


def windows_from_model(source: Source, length: int, tokens: int, seed: int) -> Windows:
    """Windows that the model writes itself, by sampling at temperature 1.

    All layers are held in memory while it writes.

    Raises:
        UsageError: too few tokens for `MIN_WINDOWS` windows.
    """
    count = tokens // length
    if count < MIN_WINDOWS:
        raise UsageError(
            "too little calibration text is asked for",
            found=f"{tokens:,} tokens",
            allowed=f"{MIN_WINDOWS * length:,} or more: {MIN_WINDOWS} windows of {length}",
        )
    held = max(1, min(round(count * HELD_OUT_SHARE), MAX_HELD_OUT // length))
    text = generate(source, count + held, length, seed)
    return Windows(text[:count], text[count:])


@torch.no_grad()
def generate(source: Source, count: int, length: int, seed: int) -> torch.Tensor:
    """Texts sampled from the model. Shapes: to [count, length]."""
    config = source.config
    layers = [load_layer(source, layer) for layer in range(config.num_hidden_layers)]
    embedding = source.read("model.embed_tokens.weight").float()
    is_tied = config.tie_word_embeddings
    head = embedding if is_tied else source.read("lm_head.weight").float()
    norm = source.read("model.norm.weight").float()
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for begin in range(0, count, _SELF_BATCH):
        batch = min(_SELF_BATCH, count - begin)
        if config.bos_token_id is None:
            ids = torch.randint(config.vocab_size, (batch, 1), generator=generator)
        else:
            ids = torch.full((batch, 1), config.bos_token_id)
        past: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(layers)
        for step in range(length - 1):
            h = embedding[ids[:, -1:]]
            for index, weights in enumerate(layers):
                h, past[index] = _step(source, index, weights, h, past[index], step)
            logits = rms_norm(h[:, -1], norm, config.rms_norm_eps) @ head.T
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, chosen), dim=1)
        parts.append(ids)
    return torch.cat(parts)


def _step(
    source: Source,
    layer: int,
    weights: Weights,
    h: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    position: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One token through one layer. Shapes: h [B, 1, D]."""
    config = source.config
    x = rms_norm(h, weights["input_layernorm.weight"], config.rms_norm_eps)
    q, k, v = queries_keys_values(x, weights, config)
    every = Rotation.of(config.inverse_frequencies(layer), position + 1, config.attention_scaling)
    here = Rotation(every.cos[-1:], every.sin[-1:])
    q, k = here.halves(q), here.halves(k)
    if past is not None:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    o_weight, o_bias = weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias")
    return feed_forward(h + F.linear(mixed, o_weight, o_bias), weights, config.rms_norm_eps), (k, v)


def _sample(windows: list[torch.Tensor], count: int, seed: int) -> torch.Tensor:
    """At most `count` of them, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)[: max(1, count)]
    return torch.stack([windows[index] for index in order.tolist()])


def _check_vocabulary(source: Source, windows: Windows) -> None:
    largest = max(int(windows.fitted.max()), int(windows.held_out.max()))
    if largest >= source.config.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {source.path} has tokens that the model does not know",
            found=f"token {largest}",
            allowed=f"0 to {source.config.vocab_size - 1}",
            hint="take the tokenizer and the weights from the same model",
        )
