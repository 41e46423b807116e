"""What `eval` scores with: the torch reference for a checkpoint, the runtime for a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import MANIFEST
from mla_deploy.evaluate.scorer import Scorer, TorchScorer
from mla_deploy.runtime import Engine, load


class BundleScorer:
    """A bundle in the runtime: the figures come from the bytes that ship."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.name = str(path)
        self.tokenizer = engine.tokenizer
        self.context = engine.bundle.manifest.model.max_position_embeddings
        self._engine = engine

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        with self._engine.session() as session:
            return session.prefill(ids, all_logits=True)


def open_scorer(path: Path, threads: int | None) -> Scorer:
    """A scorer for a checkpoint or a bundle.

    Raises:
        MlaError: neither of them, or not usable.
    """
    if (path / MANIFEST).exists():
        return BundleScorer(path, load(path, threads=threads))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return TorchScorer(path)
