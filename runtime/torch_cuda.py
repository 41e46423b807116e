"""The deployment op `latent_attention` on torch's tensors, computed by the CUDA kernels.

    torch_cuda.register()
    logits = forward_window(load_model("MODEL").cuda(), config, ids.cuda())

Needs torch; nothing else of the runtime imports this.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch

from mla_deploy import ops
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
        CudaError: a type or a size that the kernels do not have, lengths or pages that do not fit.
    """
    attention.check_finite(kv)
    if cache_format not in CACHE_FORMATS:
        tensors = (q, kv, cos, sin, w_uk, w_uv, block_table, past_lengths, new_lengths)
        settings = (cache_format, softmax_scale, latent_norm_epsilon, mode)
        return attention.reference(*tensors, cache, *settings)
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
    present = [part.clone() for part in cache]
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
