"""libmla_deploy_cuda.so from Python: `include/mla_deploy/cuda.h` through ctypes.

Arrays are given as addresses of device memory, so that any framework's will do. Nothing here waits
for the device.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_deploy.errors import MlaError
from mla_deploy.runtime import _runtime

LIBRARY = "libmla_deploy_cuda.so"
TYPES = ("float32", "float16", "bfloat16")
CACHE_FORMATS = ("int4", "int8", "fp16")
MODES = ("auto", "absorbed", "expanded")
PROBLEMS = {
    1: "a length is negative, exceeds its row of the block table, or new exceeds S",
    2: "the block table names a page that the cache does not have",
}
"""What a kernel may leave in `problem`."""


class CudaError(MlaError):
    """A call that the CUDA kernels refuse, or a device that cannot run them."""


def cuda_library() -> Path:
    """The kernels of this installation.

    Raises:
        CudaError: it was built without them.
    """
    # Beside the compiled module: an editable install keeps the Python sources elsewhere.
    folder = Path(_runtime.__file__).parent
    path = folder / LIBRARY
    if not path.is_file():
        raise CudaError(
            "this installation has no CUDA kernels",
            found=f"no {LIBRARY} in {folder}",
            hint="install from source where there is nvcc 13: "
            "pip install . -C cmake.define.MLA_CUDA=ON",
        )
    return path


class _Reals(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int), ("stride", ctypes.c_int64))


class _Attention(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("batch", "steps", "table_pages")),
        *((name, ctypes.c_int32) for name in ("heads", "nope", "rank", "rope", "v")),
        ("cache_format", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("splits", ctypes.c_int32),
        *((name, _Reals) for name in ("q", "kv", "output")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "w_uk", "w_uv")),
        *((name, ctypes.c_void_p) for name in ("block_table", "past_lengths", "new_lengths")),
        ("cache", ctypes.c_void_p * 5),
        ("pages", ctypes.c_int64),
        ("softmax_scale", ctypes.c_float),
        ("latent_norm_epsilon", ctypes.c_float),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("problem", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class AttentionSizes:
    """B sequences of S new tokens, M pages each; the model's sizes; see `cuda.h`.

    `mode`: see `MODES`; auto takes the one with fewer operations.
    `splits`: in the absorbed mode, runs of pages that a sequence is cut into; 0: as the device
    wants.
    """

    batch: int
    steps: int
    table_pages: int
    heads: int
    nope: int
    rank: int
    rope: int
    v: int
    cache_format: str
    mode: str = "auto"
    splits: int = 0


@dataclass(frozen=True)
class Tensor:
    """An address, the type of its elements and the stride of a token in elements (0: dense)."""

    address: int
    dtype: str = "float32"
    stride: int = 0


class CudaKernels:
    """One loaded library.

    Raises:
        CudaError: the file cannot be loaded, or a call is refused.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self._library = ctypes.CDLL(str(Path(path).resolve()))
        except OSError as error:
            raise CudaError(
                "the CUDA kernels cannot be loaded",
                found=str(error),
                hint="build them with -DMLA_CUDA=ON",
            ) from error
        for name in ("mla_cuda_last_error", "mla_cuda_targets"):
            getattr(self._library, name).restype = ctypes.c_char_p
        attention = ctypes.POINTER(_Attention)
        self._library.mla_cuda_workspace_bytes.argtypes = (
            attention,
            ctypes.POINTER(ctypes.c_size_t),
        )
        for call in (
            self._library.mla_cuda_latent_append,
            self._library.mla_cuda_latent_attention,
        ):
            call.argtypes = (attention, ctypes.c_void_p)

    @property
    def targets(self) -> str:
        """The architectures that the library holds, such as `sm_80 sm_90 compute_90`."""
        return str(self._library.mla_cuda_targets().decode())

    def check_device(self) -> None:
        """Returns if the current device can run the kernels."""
        self._check(self._library.mla_cuda_check_device())

    def workspace_bytes(self, sizes: AttentionSizes) -> int:
        """Bytes of workspace that a call of these sizes needs on the current device."""
        needed = ctypes.c_size_t()
        call = _describe(sizes)
        self._check(self._library.mla_cuda_workspace_bytes(call, ctypes.byref(needed)))
        return needed.value

    def latent_attention(
        self,
        sizes: AttentionSizes,
        tensors: Mapping[str, Tensor],
        cache: Sequence[int],
        pages: int,
        *,
        softmax_scale: float,
        latent_norm_epsilon: float = -1.0,
        workspace: int = 0,
        workspace_bytes: int = 0,
        problem: int = 0,
        stream: int = 0,
        append_only: bool = False,
    ) -> None:
        """Enqueues the call on `stream`.

        Args:
            tensors: q, kv, output, cos, sin, w_uk, w_uv, block_table, past_lengths, new_lengths.
            cache: addresses of the record's parts; `pages`: how many pages each has.
        """
        call = _describe(sizes)
        for name, tensor in tensors.items():
            if name in ("q", "kv", "output"):
                kind = TYPES.index(tensor.dtype)
                setattr(call, name, _Reals(tensor.address, kind, tensor.stride))
            else:
                setattr(call, name, tensor.address)
        call.cache = (ctypes.c_void_p * 5)(*cache)
        call.pages = pages
        call.softmax_scale = softmax_scale
        call.latent_norm_epsilon = latent_norm_epsilon
        call.workspace, call.workspace_bytes, call.problem = workspace, workspace_bytes, problem
        run = (
            self._library.mla_cuda_latent_append
            if append_only
            else self._library.mla_cuda_latent_attention
        )
        self._check(run(call, stream))

    def _check(self, status: int) -> None:
        if status:
            raise CudaError(self._library.mla_cuda_last_error().decode())


def _describe(sizes: AttentionSizes) -> _Attention:
    for what, found, allowed in (
        ("cache format", sizes.cache_format, CACHE_FORMATS),
        ("mode", sizes.mode, MODES),
    ):
        if found not in allowed:
            raise CudaError(
                f"the CUDA kernels do not know this {what}",
                found=found,
                allowed=", ".join(allowed),
            )
    call = _Attention(size=ctypes.sizeof(_Attention), pages=1)
    for name in ("batch", "steps", "table_pages", "heads", "nope", "rank", "rope", "v", "splits"):
        setattr(call, name, getattr(sizes, name))
    call.cache_format = CACHE_FORMATS.index(sizes.cache_format)
    call.mode = MODES.index(sizes.mode)
    return call
