"""The deployment op `latent_attention` on torch's tensors, computed by the CUDA kernels.

    torch_cuda.register()
    logits = forward_window(load_model("MODEL").cuda(), config, ids.cuda())

Needs torch; nothing else of the runtime imports this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from mla_deploy import ops
from mla_deploy.cache import cache_record
from mla_deploy.ops import attention
from mla_deploy.runtime.cuda import (
    CACHE_FORMATS,
    PROBLEMS,
    TYPES,
    AttentionSizes,
    CudaError,
    CudaKernels,
    Tensor,
    cuda_library,
)

ALIGNMENT = 256
AXES = {
    **dict.fromkeys(("q", "kv", "cos", "sin", "w_uk", "w_uv"), 3),
    "block_table": 2,
    "past_lengths": 1,
    "new_lengths": 1,
}
INDICES = ("block_table", "past_lengths", "new_lengths")


def register() -> None:
    """From now on the op is `latent_attention` below for tensors on a GPU.

    Raises:
        CudaError: this installation has no kernels, or the device cannot run them.
    """
    kernels = CudaKernels(cuda_library())
    kernels.check_device()
    ops.latent_attention.register_kernel("cuda", partial(latent_attention, kernels))


def latent_attention(
    kernels: CudaKernels,
    q: torch.Tensor,
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    block_table: torch.Tensor,
    past_lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    cache: list[torch.Tensor],
    cache_format: str,
    softmax_scale: float,
    latent_norm_epsilon: float,
    mode: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The op `mla_deploy.ops.latent_attention` by these kernels, on tensors in their memory.

    Waits for the result, as what is wrong with lengths and pages is only known then. Weights are
    rounded to float16. A cache record that has no kernel, such as `fp32`, stays with the op's
    definition in torch.

    Raises:
        CheckpointError: latents that are not finite.
        CudaError: a type or a size that the kernels do not have, a tensor of another shape, type or
            device than it should be, lengths or pages that do not fit.
    """
    attention.check_finite(kv)
    tensors = (q, kv, cos, sin, w_uk, w_uv, block_table, past_lengths, new_lengths)
    if cache_format not in CACHE_FORMATS:
        settings = (cache_format, softmax_scale, latent_norm_epsilon, mode)
        return attention.reference(*tensors, cache, *settings)
    check_tensors(dict(zip(AXES, tensors, strict=True)))
    type_name = str(q.dtype).removeprefix("torch.")
    if type_name not in TYPES:
        raise CudaError(
            "the CUDA kernels do not compute in this type",
            found=type_name,
            allowed=", ".join(TYPES),
        )
    heads, nope, rank = w_uk.shape
    batch, steps = q.shape[:2]
    sizes = AttentionSizes(
        batch=batch,
        steps=steps,
        table_pages=block_table.shape[1],
        heads=heads,
        nope=nope,
        rank=rank,
        rope=kv.shape[2] - rank,
        v=w_uv.shape[2],
        cache_format=cache_format,
        mode=mode,
    )
    output = q.new_empty((batch, steps, heads * w_uv.shape[2]))
    problem = torch.zeros(1, dtype=torch.int32, device=q.device)
    held = {
        "q": q.contiguous(),
        "kv": kv.to(q.dtype).contiguous(),
        "output": output,
        "cos": cos.float().contiguous(),
        "sin": sin.float().contiguous(),
        "w_uk": w_uk.half().contiguous(),
        "w_uv": w_uv.half().contiguous(),
        "block_table": block_table.contiguous(),
        "past_lengths": past_lengths.contiguous(),
        "new_lengths": new_lengths.contiguous(),
    }
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        needed = kernels.workspace_bytes(sizes)
        check_cache(cache, sizes, q.device)
        present = [part.clone(memory_format=torch.contiguous_format) for part in cache]
        workspace = torch.empty(needed + ALIGNMENT, dtype=torch.uint8, device=q.device)
        kernels.latent_attention(
            sizes,
            {name: Tensor(one.data_ptr(), type_name) for name, one in held.items()},
            [part.data_ptr() for part in present],
            present[0].shape[0],
            softmax_scale=softmax_scale,
            latent_norm_epsilon=latent_norm_epsilon,
            workspace=-(-workspace.data_ptr() // ALIGNMENT) * ALIGNMENT,
            workspace_bytes=needed,
            problem=problem.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream if q.is_cuda else 0,
        )
    if found := int(problem):
        raise CudaError(PROBLEMS[found])
    return output, present


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a CudaError unless these tensors, by their names in `AXES`, are those of one call:
    the kernels are given addresses, and would read beyond what is there."""
    for name, one in tensors.items():
        if one.ndim != AXES[name]:
            raise _misshapen(name, one, f"{AXES[name]} axes")
    batch, steps, _ = tensors["q"].shape
    heads, nope, rank = tensors["w_uk"].shape
    rope, v = tensors["kv"].shape[2] - rank, tensors["w_uv"].shape[2]
    shapes = {
        "q": (batch, steps, heads * (nope + rope)),
        "kv": (batch, steps, rank + rope),
        "cos": (batch, steps, rope // 2),
        "sin": (batch, steps, rope // 2),
        "w_uv": (heads, rank, v),
        "block_table": (batch, tensors["block_table"].shape[1]),
        "past_lengths": (batch,),
        "new_lengths": (batch,),
    }
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise _misshapen(name, tensors[name], f"{list(shape)}, from q, w_uk and kv")
    for name in INDICES:
        _check_type(name, tensors[name], torch.int64)
    for name, one in tensors.items():
        _check_device(name, one, tensors["q"].device)


def check_cache(cache: Sequence[torch.Tensor], sizes: AttentionSizes, device: torch.device) -> None:
    """Raise a CudaError unless the cache is the record's parts, all of as many pages."""
    parts = cache_record(sizes.cache_format).parts(sizes.rank, sizes.rope)
    if len(cache) != len(parts):
        raise CudaError(
            "latent_attention was given another number of cache parts than the record has",
            found=len(cache),
            allowed=f"{len(parts)} for {sizes.cache_format}: "
            + ", ".join(part.name for part in parts),
        )
    for part, one in zip(parts, cache, strict=True):
        name = f"the cache's part {part.name}"
        shape = (*cache[0].shape[:1], *part.page_shape)
        if one.shape != shape:
            raise _misshapen(name, one, f"{list(shape)}, of {sizes.cache_format}")
        _check_type(name, one, part.dtype)
        _check_device(name, one, device)


def _misshapen(name: str, one: torch.Tensor, allowed: str) -> CudaError:
    return CudaError(
        f"latent_attention: {name} has a shape that does not go with the rest",
        found=list(one.shape),
        allowed=allowed,
        hint="mla_deploy.ops.latent_attention names the shapes",
    )


def _check_type(name: str, one: torch.Tensor, dtype: torch.dtype) -> None:
    what = "is of a type that the kernels do not read"
    _check_equal(name, what, one.dtype, dtype, "convert it with .to()")


def _check_device(name: str, one: torch.Tensor, device: torch.device) -> None:
    _check_equal(name, "is not where q is", one.device, device, "move it there with .to()")


def _check_equal(name: str, what: str, found: object, allowed: object, hint: str) -> None:
    if found != allowed:
        raise CudaError(f"latent_attention: {name} {what}", found=found, allowed=allowed, hint=hint)
