"""From a folder to an engine, whichever the bundle is for."""

from __future__ import annotations

import os
from pathlib import Path

from mla_deploy.bundle import Bundle
from mla_deploy.errors import GraphError, KernelsError, UsageError
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.core_engine import CoreEngine
from mla_deploy.runtime.cuda import cuda_library
from mla_deploy.runtime.engine import Engine
from mla_deploy.runtime.native import onnxruntime_library, require_engine
from mla_deploy.runtime.ops import Kernels, choose

PREFILL_CHUNK = 512
MOST, MOST_TOKENS = (1 << 32) - 1, (1 << 64) - 1
"""What the engine's integers hold; it refuses less than that."""


def load(
    bundle: Path | str,
    *,
    max_tokens: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    threads: int | None = None,
    spin: bool = True,
    kernels: str = "auto",
    device: str | None = None,
    verify: bool = False,
) -> Engine:
    """Load a bundle.

    Args:
        bundle: the folder.
        max_tokens: the cache holds so many tokens of all sessions together, rounded up to whole
            pages; None: one session of the model's full context. Memory is taken as it is used, and
            on a GPU at once.
        prefill_chunk: new tokens that go through the graph at once; bounds the memory of a prefill.
        threads: that compute; None: one a physical core.
        spin: waiting threads poll for a moment before they sleep: faster, and costs power.
        kernels: of latent attention. "native": our operator library; "stock": what onnxruntime has;
            "auto": native where it can be had. `Engine.kernels` says what it became, and why.
        device: "cpu", or "cuda": the first GPU that the process sees. It must be what the bundle
            was exported for; None: that it is.
        verify: check the sha256 of large files too.

    Raises:
        BundleError: the folder is no bundle, is damaged, or was exported for another device; as a
            GraphError: this onnxruntime cannot load its graph.
        UsageError: an option outside its range, onnxruntime is not installed, kernels are asked for
            that this installation does not have, or it was built without the engine; on a GPU also:
            there is no driver or device for our kernels, or this onnxruntime has no CUDA provider.
        CudaError: on a GPU: this installation was built without kernels for it.
    """
    require_engine()
    for name, value in (
        ("max_tokens", max_tokens),
        ("prefill_chunk", prefill_chunk),
        ("threads", threads),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is out of range", found=value, allowed="1 or more")
    opened = Bundle.of_manifest(bundle)  # the engine checks the files
    if opened.manifest.tensorrt is not None:
        opened = Bundle.open(bundle, verify=verify)
        _check_tensorrt(prefill_chunk, threads, kernels, device)
        from mla_deploy.runtime.tensorrt import load_tensorrt

        return load_tensorrt(opened, max_tokens)
    on_gpu = opened.manifest.target == "cuda" and device in (None, "cuda")
    cuda = cuda_library() if on_gpu else None  # where they do not fit, the engine says so

    def core(library: Path | None) -> _runtime.Engine:
        return _runtime.Engine(
            bundle=os.fsencode(opened.path),
            onnxruntime_library=os.fsencode(onnxruntime_library()),
            ops_library=None if library is None else os.fsencode(library),
            max_tokens=min(max_tokens or 0, MOST_TOKENS),
            prefill_chunk=min(prefill_chunk, MOST),
            threads=min(threads or 0, MOST),
            spin=spin,
            verify=verify,
            device=device,
            cuda_library=None if cuda is None else os.fsencode(cuda),
        )

    chosen = choose(kernels, on_gpu=on_gpu)
    try:
        return CoreEngine(opened, core(chosen.library), chosen)
    except (GraphError, KernelsError) as error:  # such as a record that the library lacks
        if kernels != "auto" or chosen.library is None:
            raise
        chosen = Kernels(None, error.found or error.what)
    return CoreEngine(opened, core(None), chosen)


def _check_tensorrt(
    prefill_chunk: int, threads: int | None, kernels: str, device: str | None
) -> None:
    """Refuse what a TensorRT engine has no use for, or has fixed when it was built."""
    if threads is not None or kernels != "auto" or device is not None:
        raise UsageError(
            "threads, kernels and device are for bundles that run on ONNX Runtime",
            found=f"threads {threads}, kernels {kernels}, device {device}",
            hint="leave them out: TensorRT runs on the GPU with kernels of its own",
        )
    if prefill_chunk != PREFILL_CHUNK:
        raise UsageError(
            "the prefill_chunk of TensorRT's engines is fixed when they are built",
            found=prefill_chunk,
            hint="leave it out, or export with another --prefill-chunk",
        )
