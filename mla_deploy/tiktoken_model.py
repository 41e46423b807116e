r"""A tokenizer.json for models that ship `tiktoken.model` instead: Moonlight and Kimi.

Each line of that file is a token in base64 and its rank, which is also its id. tiktoken joins the
neighbours that make the token of the lowest rank, the leftmost first. tokenizer.json lists pairs:

    tiktoken.model    YQ== 64, Yg== 65, ... YWI= 300
    tokenizer.json    merges: [["a", "b"], ...], the pair of rank 256 first

One pair for a token is enough: the two parts that joining by lower ranks leaves of it. Within a
text, too, its bytes are joined in that order before anything else makes them this token.

How a text is cut into words before that, and that 256 special tokens follow the ranks, is Python
code of the model's repository (`tokenization_kimi.py`). It is not run: what it says is here.

May be imported by the runtime: needs neither torch nor transformers.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mla_deploy.errors import TokenizerError
from mla_deploy.spelling import byte_level_characters

TIKTOKEN_MODEL = "tiktoken.model"
SPECIAL_TOKENS = 256
MAX_BYTES = 1 << 26
"""Of the file; Kimi's has 2.8 MB."""
MAX_TOKEN = 1024
"""Bytes of a token."""

PATTERNS = {
    "TikTokenTokenizer": "|".join(
        [
            r"[\p{Han}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
}
"""Where a text is cut, by `tokenizer_class` of tokenizer_config.json."""


def tokenizer_of_ranks(path: Path, config: Mapping[str, Any]) -> str:
    """The text of a tokenizer.json.

    Args:
        path: tiktoken.model.
        config: tokenizer_config.json, which names the class and the special tokens.

    Raises:
        TokenizerError: the file is broken, or the class is not known.
    """
    pattern = _pattern(path, config.get("tokenizer_class"))
    tokens = _read_tokens(path)
    spelling = str.maketrans(dict(enumerate(byte_level_characters())))
    spelled = [token.decode("latin-1").translate(spelling) for token in tokens]
    merges = [
        [part.decode("latin-1").translate(spelling) for part in pair] for pair in _merges(tokens)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    cut = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _special_tokens(path, config.get("added_tokens_decoder"), spelled),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token becomes it, as in tiktoken
            "vocab": {token: rank for rank, token in enumerate(spelled)},
            "merges": merges,
        },
    }
    return json.dumps(made, ensure_ascii=False)


def _pattern(path: Path, name: object) -> str:
    if not isinstance(name, str) or name not in PATTERNS:
        raise TokenizerError(
            f"how a text is cut into words before {path} is known for some tokenizers only",
            found=f"tokenizer_class {json.dumps(name)[:60]} in tokenizer_config.json",
            allowed=", ".join(PATTERNS),
            hint="put a tokenizer.json beside it; transformers' TikTokenConverter makes one with "
            "the pattern of the class",
        )
    return PATTERNS[name]


def _read_tokens(path: Path) -> list[bytes]:
    """The tokens by rank."""
    try:
        size = path.stat().st_size
        lines = path.read_bytes().splitlines() if size <= MAX_BYTES else []
    except OSError as error:
        raise _broken(path, str(error), "a readable file") from None
    if size > MAX_BYTES:
        raise _broken(path, f"{size} bytes", f"at most {MAX_BYTES}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        try:
            spelled, rank = fields
            token = base64.b64decode(spelled, validate=True)
        except (ValueError, binascii.Error):
            token, rank = b"", b""
        if not 0 < len(token) <= MAX_TOKEN or not (rank.isdigit() and len(rank) < 9):
            raise _broken(
                path,
                f"line {number}: {line[:40]!r}",
                f"a token of 1 to {MAX_TOKEN} bytes in base64, a space, and its rank",
            )
        if token in ranks:
            raise _broken(path, f"line {number}: {line[:40]!r} once more", "each token once")
        ranks[token] = int(rank)
    tokens = sorted(ranks, key=ranks.__getitem__)
    for place, token in enumerate(tokens):
        if ranks[token] != place:
            raise _broken(
                path,
                f"rank {ranks[token]} in place {place}",
                f"each rank from 0 to {len(tokens) - 1}",
            )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise _broken(path, f"no token for the byte {byte:#04x}", "all 256 bytes are tokens")
    return tokens


def _merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Pairs to join, the lowest rank of what they make first."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _joined(token, ranks, rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:  # a token that was not learnt but put in: by whatever pair comes up
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            merges += [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
    return merges


def _joined(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """The parts of a token that joining by lower ranks leaves."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while True:
        best, at = min(
            (ranks.get(left + right, below), at) for at, (left, right) in enumerate(pairwise(parts))
        )
        if best >= below:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _special_tokens(path: Path, named: object, spelled: list[str]) -> list[dict[str, Any]]:
    """The 256 that follow the ranks, with the names that tokenizer_config.json gives some."""
    first, known = len(spelled), set(spelled)
    ids = range(first, first + SPECIAL_TOKENS)
    contents = {token_id: f"<|reserved_token_{token_id}|>" for token_id in ids}
    ordinary = set()
    if named is not None and not isinstance(named, dict):
        raise _broken_names(path, json.dumps(named)[:60], ids)
    for key, entry in (named or {}).items():
        match entry:
            case {"content": str(content)} if key in map(str, ids):
                contents[int(key)] = content
                if entry.get("special") is False:
                    ordinary.add(int(key))
            case _:
                raise _broken_names(path, f"{key[:20]}: {json.dumps(entry)[:60]}", ids)
    for token_id, content in contents.items():
        if content in known or not content:
            raise _broken_names(path, f"{token_id}: {content[:60]!r}, a token already", ids)
        known.add(content)
    return [
        {
            "id": token_id,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_id not in ordinary,
        }
        for token_id, content in contents.items()
    ]


def _broken_names(path: Path, found: str, ids: range) -> TokenizerError:
    return TokenizerError(
        f"added_tokens_decoder in tokenizer_config.json does not fit {path}",
        found=found,
        allowed=f"ids from {ids[0]} to {ids[-1]}, each with a content of its own",
        hint="take both files from the same model",
    )


def _broken(path: Path, found: str, allowed: str) -> TokenizerError:
    return TokenizerError(
        f"{path} is not a list of tokens and ranks", found=found, allowed=allowed,
        hint="copy the file again",
    )  # fmt: skip
