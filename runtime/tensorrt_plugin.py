"""The TensorRT plugin of this installation, for bundles that were exported with `--plugin`."""

from __future__ import annotations

from pathlib import Path

from mla_deploy.errors import UsageError
from mla_deploy.runtime import _runtime

LIBRARY = "libmla_deploy_tensorrt.so"
PLUGIN, PLUGIN_NAMESPACE = "LatentAttention", "ai.mla_deploy"


def plugin_library() -> Path | None:
    """The library; None where the installation was built without it."""
    # Beside the compiled module: an editable install keeps the Python sources elsewhere.
    path = Path(_runtime.__file__).parent / LIBRARY
    return path if path.is_file() else None


def require_plugin_library() -> Path:
    """The library.

    Raises:
        UsageError: there is none.
    """
    path = plugin_library()
    if path is None:
        raise UsageError(
            "the bundle's engines need the TensorRT plugin, and this installation has none",
            found=f"no {LIBRARY} in {Path(_runtime.__file__).parent}",
            hint="install from source with -C cmake.define.MLA_CUDA=ON "
            "-C cmake.define.MLA_TENSORRT=ON and TENSORRT_ROOT set, or export without --plugin",
        )
    return path
