"""Small random models with ordinary attention, of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from support.models import VOCAB, randomize

CLASSES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
}
"""What a family needs said, or shows what is its own."""


def random_source(family: str, rope: str = "default", **changes: Any) -> Any:
    """Two layers in float32: 8 query heads of 16 over 4 key heads."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "eager",
        **EXTRA[family],
        **changes,
    }
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(**settings)).eval()
    randomize(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("proj.bias"):
                tensor.normal_(std=0.5)
    return model


def random_text(folder: Path, words: int = 1500) -> Path:
    """A text file of random words, a token or two each."""
    letters = torch.randint(97, 123, (words, 3)).tolist()
    file = folder / "text.txt"
    file.write_text(" ".join("".join(map(chr, word)) for word in letters))
    return file


def byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes whose ids all lie within the small vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {chr(code): 2 + code - 32 for code in range(33, 127)}
    vocabulary = {"<s>": 0, "</s>": 1, "\u0120": 2, **printable}
    left = [one for one in alphabet if one not in vocabulary][: VOCAB - len(vocabulary)]
    vocabulary |= {one: len(vocabulary) + place for place, one in enumerate(left)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
