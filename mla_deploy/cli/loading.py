"""The engine of a command that computes with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_deploy.cli.reporter import Reporter

if TYPE_CHECKING:
    from mla_deploy.runtime import Engine


def load_engine(reporter: Reporter, bundle: Path, *, kernels: str | None, **options: Any) -> Engine:
    """Load a bundle, and say where its kernels are not the native ones.

    Args:
        kernels: as the user chose; None: not at all.
        options: of `mla_deploy.runtime.load`.

    Raises:
        MlaError: as `load`.
    """
    from mla_deploy.runtime import load

    engine = load(bundle, kernels=kernels or "auto", **options)
    reporter.kernels(engine.kernels, kernels)
    return engine
