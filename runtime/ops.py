"""The operator library: the kernels of latent attention for ONNX Runtime.

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ops_library()))

With it a session calls the kernels at the nodes `ai.mla_deploy::LatentAttention`; without it
ONNX Runtime inlines the function that the model brings. Both leave the same cache.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mla_deploy.errors import UsageError
from mla_deploy.runtime import _runtime

LIBRARY = "libmla_deploy_ops.so"
CHOICES = ("auto", "native", "stock")


def ops_library() -> Path:
    """The file to give to `SessionOptions.register_custom_ops_library`, or to its C equivalent.

    Raises:
        UsageError: this installation was built without it.
    """
    # Beside the compiled module: an editable install keeps the Python sources elsewhere.
    folder = Path(_runtime.__file__).parent
    path = folder / LIBRARY
    if not path.is_file():
        raise UsageError(
            "this installation has no operator library",
            found=f"no {LIBRARY} in {folder}",
            hint="set ONNXRUNTIME_ROOT to a folder with onnxruntime's headers (on Debian, "
            "`tools/fetch_debian.py libonnxruntime-dev` prints one) and install mla-deploy from "
            "source again; docs/operator-library.md has more",
        )
    return path


@dataclass(frozen=True)
class Kernels:
    """What computes latent attention in an engine.

    Attributes:
        library: the operator library; None: standard operators of ONNX Runtime do.
        reason: why there is no library in use; empty if there is.
    """

    library: Path | None
    reason: str = ""

    @property
    def name(self) -> Literal["native", "stock", "TensorRT"]:
        """ "native", "stock", or "TensorRT" in an engine of it."""
        return "stock" if self.library is None else "native"

    def __str__(self) -> str:
        return f"{self.name} ({self.library or self.reason})"


def choose(wanted: str, *, on_gpu: bool = False) -> Kernels:
    """The kernels for "auto", "native" or "stock".

    Raises:
        UsageError: an unknown choice, "native" where there is no library, or MLA_CPU_ISA names an
            instruction set that is not to be had.
    """
    if wanted not in CHOICES:
        raise UsageError("unknown kernels", found=wanted, allowed=", ".join(CHOICES))
    if wanted == "stock":
        return Kernels(None, "as asked")
    try:
        library = ops_library()
    except UsageError as error:
        if wanted == "native":
            raise
        return Kernels(None, f"{error.what}: {error.found}")
    if on_gpu:
        return Kernels(library)  # it has kernels for GPUs where libmla_deploy_cuda.so is beside it
    isas = _runtime.cpu_isas()
    forced = os.environ.get("MLA_CPU_ISA", "auto") or "auto"
    if forced not in ("auto", *isas):
        raise UsageError(
            "MLA_CPU_ISA names an instruction set that this CPU or this build does not have",
            found=forced,
            allowed=", ".join(("auto", *isas)),
            hint="unset it, or load the bundle with kernels='stock'",
        )
    if wanted == "auto" and forced == "auto" and isas == ["portable"]:
        return Kernels(None, "for this CPU there are portable kernels only, which are slower")
    return Kernels(library)
