"""What the tests of engines need to know of the GPU at hand."""

from __future__ import annotations

import pytest

from mla_deploy.exporters.tensorrt.capability import RTX_TARGETS
from mla_deploy.gpu import gpu_target
from mla_deploy.manifest import PORTABLE_TARGET


def engine_target(*, own: bool) -> str:
    """A target of TensorRT-RTX that this machine's GPU runs, or a skip.

    Args:
        own: the GPU's own, in place of the one for all.
    """
    for module in ("tensorrt_rtx", "cuda.bindings.runtime"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    target = gpu_target()
    if target is None or int(target.removeprefix("sm")) < 80:
        pytest.skip(f"there is no GPU that takes 4 bits, but {target}")
    if own and target not in RTX_TARGETS:
        pytest.skip(f"TensorRT-RTX has no target {target}")
    return target if own else PORTABLE_TARGET
