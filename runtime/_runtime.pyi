"""The C++ part of mla_deploy.runtime."""



def version() -> str:
    """The version of mla-deploy that this module was built from."""

def cpu_features() -> list[str]:
    """
    The instruction sets that this CPU and its operating system offer to kernels.

    Of avx2, avx_vnni, avx512f, avx512_vnni, avx512_bf16, amx_int8, amx_bf16, neon,
    dotprod and i8mm those present, in this order.
    """

def cpu_isas() -> list[str]:
    """
    The instruction sets that latent attention can be told to use here, slowest first.
    """

class LatentAttentionWeights:
    """w_uk [H, N, rank] and w_uv [H, rank, V] as the kernels hold them."""

    def __init__(self, w_uk: object, w_uv: object, qk_rope_head_dim: int, precision: str = 'bf16') -> None:
        """
        Copies float32, float16 or uint16 (bfloat16 bits) arrays; precision: fp32 (exact kernels), bf16 or int8.
        """

    @property
    def nbytes(self) -> int:
        """Bytes held."""

class LatentAttentionExecutor:
    """Threads and a workspace; keep and reuse."""

    def __init__(self, threads: int = 1) -> None: ...

    @property
    def nbytes(self) -> int:
        """Bytes of workspace held."""

def latent_attention(executor: LatentAttentionExecutor, q: object, kv: object, cos: object, sin: object, weights: LatentAttentionWeights, block_table: object, past_lengths: object, new_lengths: object, cache: list[object], output: object, cache_format: str, softmax_scale: float, latent_norm_epsilon: float = -1.0, mode: str = 'auto', isa: str = 'auto', append_only: bool = False) -> None:
    """
    The native kernel on numpy arrays; shapes as torch.ops.mla_deploy.latent_attention.

    Writes the new tokens into `cache` and the attention into `output`, both in place.
    Raises ValueError for arguments that do not fit, RuntimeError for an instruction set
    that is unknown or missing. The GIL is released while it computes.
    """
