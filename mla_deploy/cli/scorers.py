"""What `eval` scores with: the torch reference for a checkpoint, the runtime for a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import MANIFEST
from mla_deploy.errors import UsageError
from mla_deploy.evaluate.scorer import TextGenerator, TorchScorer
from mla_deploy.runtime import Engine, GenerationOptions, load


class BundleScorer:
    """A bundle in the runtime: the figures come from the bytes that ship."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.name = str(path)
        self.tokenizer = engine.tokenizer
        self.context = engine.bundle.manifest.model.max_position_embeddings
        self.kernels = engine.kernels
        self._engine = engine

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        with self._engine.session() as session:
            return session.prefill(ids, all_logits=True)

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> str:
        options = GenerationOptions(max_tokens=max_tokens, stop=tuple(stop))
        return self._engine.generate(ids, options).text


def open_scorers(
    paths: Sequence[Path], threads: int | None, kernels: str | None
) -> list[TextGenerator]:
    """A scorer for each checkpoint or bundle.

    Raises:
        UsageError: kernels are chosen where there is no bundle.
        MlaError: a path is neither of them, or not usable.
    """
    if kernels is not None and not any(_is_bundle(path) for path in paths):
        raise UsageError(
            "--kernels is for bundles; a checkpoint is computed by the torch reference",
            found=", ".join(str(path) for path in paths),
            hint="leave --kernels out",
        )
    return [_open(path, threads, kernels or "auto") for path in paths]


def _is_bundle(path: Path) -> bool:
    return (path / MANIFEST).exists()


def _open(path: Path, threads: int | None, kernels: str) -> TextGenerator:
    if _is_bundle(path):
        # No spinning: the reference's threads want the same cores.
        return BundleScorer(path, load(path, threads=threads, spin=False, kernels=kernels))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return TorchScorer(path)
