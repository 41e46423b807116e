"""What `eval` scores with: the torch reference for a checkpoint, the runtime for a bundle."""

from __future__ import annotations

from pathlib import Path

from mla_deploy.bundle import MANIFEST
from mla_deploy.evaluate.scorer import Scorer, TorchScorer


def open_scorer(path: Path, threads: int | None) -> Scorer:
    """A scorer for a checkpoint or a bundle.

    Raises:
        MlaError: neither of them, or not usable.
    """
    if (path / MANIFEST).exists():
        raise NotImplementedError
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return TorchScorer(path)
