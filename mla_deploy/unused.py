"""Tensors of a checkpoint that its model does not use: with a reason, or refused."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Protocol

from mla_deploy.checkpoint import TensorFolder
from mla_deploy.errors import CheckpointError

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_DERIVED = "rotary_emb.inv_freq"
"""Buffers that old checkpoints hold; they follow from config.json."""


class Sizes(Protocol):
    """What of a config.json says which tensors there may be."""

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def tie_word_embeddings(self) -> bool: ...


def unused_tensors(
    folder: TensorFolder, used: Container[str], sizes: Sizes
) -> dict[str, tuple[str, ...]]:
    """Names by the reason why they are left out.

    Args:
        used: what the model takes.

    Raises:
        CheckpointError: there is none for one of them: it could change the result.
    """
    found: dict[str, list[str]] = {}
    unknown = []
    for name in folder.tensors:
        layer = _LAYER.match(name)
        if name in used:
            continue
        if layer and int(layer[1]) >= sizes.num_hidden_layers:
            found.setdefault("multi-token prediction, which is not run", []).append(name)
        elif name.endswith(_DERIVED):
            found.setdefault("follows from config.json", []).append(name)
        elif name == "lm_head.weight" and sizes.tie_word_embeddings:
            found.setdefault("tied to the embedding", []).append(name)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{folder.path} holds tensors that the model does not use",
            found=f"{len(unknown)}, such as {unknown[0]}",
            hint="check that config.json belongs to these weights",
        )
    return {reason: tuple(names) for reason, names in found.items()}
