"""The C++ part of mla_deploy.runtime."""

from collections.abc import Sequence
from typing import Literal


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

class Cancellation:
    """
    Stops the calls of other threads that were given it.

    Once requested it stays so: make one for each request.
    """

    def __init__(self) -> None: ...

    def request(self) -> None:
        """
        Stop the calls that were given it, in the midst of the graph too, and those that
        will be. Returns at once.
        """

    @property
    def requested(self) -> bool:
        """Whether `request` was called."""

class Session:
    """A sequence of tokens in the cache."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    @property
    def room(self) -> int:
        """Tokens that can be added now."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of its pages, those shared with forks included."""

    def tokens(self) -> list[int]:
        """The tokens in the cache."""

    def common_prefix(self, ids: object) -> int:
        """How many of the ids, int64 [count], the session holds at its start."""

    def rewind(self, length: int) -> None:
        """Forgets all tokens but the first ones."""

    def fill_by_copies(self, length: int) -> None:
        """Grows by copies of whole pages, without computing."""

    def fork(self) -> Session:
        """Another session of the same tokens and pages."""

    def save(self, path: bytes) -> None:
        """Writes the session to a file, whole or not at all."""

class Engine:
    """A bundle in memory, and the cache that its sessions share."""

    def __init__(self, bundle: bytes, onnxruntime_library: bytes, ops_library: bytes | None, max_tokens: int, prefill_chunk: int, threads: int, spin: bool, verify: bool, device: str | None, cuda_library: bytes | None) -> None:
        """
        Paths as os.fsencode gives them; the numbers as in runtime.h, 0 for the default.
        """

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the cache holds, of all sessions together."""

    @property
    def free_tokens(self) -> int:
        """Of these, those in pages that no session uses now."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache for one token, in all layers."""

    @property
    def onnxruntime_version(self) -> str:
        """The version of the library that runs the graph."""

    def session(self) -> Session:
        """An empty session."""

    def load_session(self, path: bytes) -> Session:
        """A session that Session.save wrote to a file."""

    def check_tokens(self, ids: object) -> None:
        """Whether there are ids, and all are of the model. ids: int64 [count]."""

    def step(self, requests: Sequence[tuple[Session, object, object, object]], cancellation: Cancellation | None = None) -> None:
        """
        Appends tokens to several sessions at once; each request is (session, ids, positions,
        logits): int64 [count] and int64 [positions] in, float32 [positions, vocab_size] out.
        """

class SamplingOptions:
    """How the next token is chosen."""

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int | None = None) -> None:
        """
        As mla_deploy.runtime.GenerationOptions. Raises UsageError for a value out of range.
        """

class Sampler:
    """Picks the tokens of one sequence."""

    def __init__(self, options: SamplingOptions, vocab_size: int) -> None: ...

    def observe(self, ids: object) -> None:
        """Notes tokens of the sequence, for the repetition penalty."""

    def pick(self, logits: object) -> int:
        """The next token. logits: float32 [vocab_size]."""

    def distribution(self, logits: object) -> tuple[list[int], list[float]]:
        """The tokens that can be picked, and their probabilities."""

class Generation:
    """A generation that is asked for token after token."""

    def __init__(self, session: Session, prompt: object, sampling: SamplingOptions, end_tokens: Sequence[int], max_tokens: int) -> None:
        """prompt: int64 [count]. end_tokens: with one of them the text ends."""

    def next(self, cancellation: Cancellation | None = None) -> tuple[int, Literal['eos', 'length', 'context'] | None] | None:
        """
        Makes a token, the first one after computing the prompt; the token, and why it is the
        last one if it is. None: it was cancelled, or has ended before.
        """

    def result(self) -> tuple[int, float, float, int]:
        """
        So far: tokens of the prompt found in the cache, milliseconds of prefill and of
        decoding, bytes of the session's pages.
        """
