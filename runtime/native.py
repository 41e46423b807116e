"""What the compiled module needs of Python: whether it is whole, and where onnxruntime is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mla_deploy.errors import UsageError
from mla_deploy.runtime import _runtime

Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def require_engine() -> None:
    """Raise a UsageError if this installation was built without the engine (MLA_ENGINE=OFF)."""
    if not hasattr(_runtime, "Engine"):
        raise UsageError(
            "this installation cannot run bundles",
            found=f"{_runtime.__file__}, built without the engine (MLA_ENGINE=OFF)",
            hint="install mla-deploy from source again without that setting; the build says which "
            "headers are missing, and docs/embedding.md where to get them",
        )


def onnxruntime_library() -> Path:
    """The shared library in the installed package onnxruntime, which is not imported for it.

    Raises:
        UsageError: the package is not installed, or holds no such library.
    """
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise UsageError(
            "onnxruntime is not installed",
            hint="pip install onnxruntime, or onnxruntime-gpu",
        )
    folder = Path(found.origin).parent / "capi"
    libraries = sorted(folder.glob("libonnxruntime.so*"))
    if not libraries:
        raise UsageError(
            "the installed onnxruntime has no shared library",
            found=f"no libonnxruntime.so in {folder}",
            hint="pip install --force-reinstall onnxruntime",
        )
    return libraries[-1]


def token_array(ids: Sequence[int] | npt.NDArray[np.integer]) -> Integers:
    """The ids as the engine takes them: [len(ids)].

    Raises:
        UsageError: they are not integers.
    """
    if not len(ids):
        return np.empty(0, dtype=np.int64)
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):  # lists of lists of unequal lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
        raise UsageError(
            "tokens must be a flat list of integers", found=repr(ids)[:80], allowed="token ids"
        )
    return np.ascontiguousarray(array, dtype=np.int64)
