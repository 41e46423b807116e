"""The files of a tokenizer on their way from a checkpoint: to another checkpoint, or to a bundle.

A checkpoint keeps the files that it has. A bundle's say in one place what Python reads from
several, because C, C++ and stock programs read tokenizer.json alone: what comes before and after a
text is in its post-processor, and the chat template in a file of its own.

Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mla_deploy.tiktoken_model import TIKTOKEN_MODEL, tokenizer_of_ranks
from mla_deploy.tokenizer import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    OLD_CHAT_TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Tokenizer,
    read_object,
)

BUNDLE_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
)
CHECKPOINT_FILES = (
    *BUNDLE_FILES,
    OLD_CHAT_TEMPLATE,
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def checked_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, of which all files are known to be good.

    Raises:
        TokenizerError: there is none, or it is broken or not supported.
    """
    tokenizer = Tokenizer.open(source)
    tokenizer.check_templates()
    return tokenizer


def check_tokenizer_if_any(source: Path) -> None:
    """As `checked_tokenizer`; a checkpoint without tokenizer is fine."""
    if any((source / name).is_file() for name in (TOKENIZER, TIKTOKEN_MODEL)):
        checked_tokenizer(source)


def copy_to_checkpoint(source: Path, folder: Path) -> None:
    """Copy the files that the source has; of `tiktoken.model`, a tokenizer.json is made."""
    for name in CHECKPOINT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (source / TOKENIZER).is_file() and (source / TIKTOKEN_MODEL).is_file():
        (folder / TOKENIZER).write_text(_made_of_ranks(source), encoding="utf-8")


def write_to_bundle(tokenizer: Tokenizer, source: Path, folder: Path) -> list[str]:
    """Write the files of a checkpoint's tokenizer; gives their names."""
    for name in BUNDLE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / TOKENIZER).is_file():
        (folder / TOKENIZER).write_text(_made_of_ranks(source), encoding="utf-8")
    definition = read_object(folder / TOKENIZER)
    if (changed := _whole(definition, tokenizer)) != definition:
        (folder / TOKENIZER).write_text(json.dumps(changed, ensure_ascii=False), encoding="utf-8")
    if (source / OLD_CHAT_TEMPLATE).is_file():
        (folder / CHAT_TEMPLATE).write_text(tokenizer.templates["default"], encoding="utf-8")
    return [name for name in BUNDLE_FILES if (folder / name).is_file()]


def _made_of_ranks(source: Path) -> str:
    return tokenizer_of_ranks(source / TIKTOKEN_MODEL, read_object(source / TOKENIZER_CONFIG))


def _whole(definition: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json that gives every reader the ids of `Tokenizer.encode`."""
    whole = dict(definition)
    for unused in ("truncation", "padding"):
        if whole.get(unused) is not None:
            whole[unused] = None
    if tokenizer.ends != tokenizer.ends_in_file:
        whole["post_processor"] = _post_processor(tokenizer)
    return whole


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    before, after = ([tokenizer.token(one) for one in ids] for ids in tokenizer.ends)
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    first, last = (
        [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
        for tokens in (before, after)
    )
    ids = dict(zip([*before, *after], [*tokenizer.ends[0], *tokenizer.ends[1]], strict=True))
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, other, *last],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in ids.items()
        },
    }
