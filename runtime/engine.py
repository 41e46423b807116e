"""A model in memory: the graph, the cache that its sessions share, and the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import Bundle
from mla_deploy.errors import GraphError, UsageError
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.bundle_text import BundleText
from mla_deploy.runtime.cancellation import Cancellation
from mla_deploy.runtime.cuda import cuda_library
from mla_deploy.runtime.generation import Generation, GenerationResult
from mla_deploy.runtime.native import Logits, onnxruntime_library, require_engine, token_array
from mla_deploy.runtime.ops import Kernels, choose
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.session import Session

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
        return _load_tensorrt(opened, max_tokens, threads=threads, kernels=kernels, device=device)
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
        return Engine(opened, core(chosen.library), chosen)
    except GraphError as error:  # such as a cache format that the library lacks
        if kernels != "auto" or chosen.library is None:
            raise
        chosen = Kernels(None, error.found or error.what)
    return Engine(opened, core(None), chosen)


def _load_tensorrt(
    bundle: Bundle,
    max_tokens: int | None,
    *,
    threads: int | None,
    kernels: str,
    device: str | None,
) -> Engine:
    if threads is not None or kernels != "auto" or device is not None:
        raise UsageError(
            "threads, kernels and device are for bundles that run on ONNX Runtime",
            found=f"threads {threads}, kernels {kernels}, device {device}",
            hint="leave them out: TensorRT runs on the GPU with kernels of its own",
        )
    from mla_deploy.runtime.tensorrt import load_tensorrt

    # Not the class, but its methods.
    return cast("Engine", load_tensorrt(bundle, max_tokens))


class Engine(BundleText):
    """A loaded bundle. Made by `load`.

    It computes in C++ (`csrc/core/`), without Python's lock. Sessions may be used from several
    threads; the graph runs one step at a time, and callers get their turns in order.

    Attributes:
        bundle: what was loaded.
        capacity_tokens: tokens that the cache holds, of all sessions together.
        kv_bytes_per_token: bytes of cache for one token in all layers, scales and zeros included,
            counted on the arrays themselves.
        kernels: what computes latent attention.
    """

    def __init__(self, bundle: Bundle, core: _runtime.Engine, kernels: Kernels) -> None:
        """Use `load`."""
        self.bundle = bundle
        self.kernels = kernels
        self.capacity_tokens = core.capacity_tokens
        self.kv_bytes_per_token = core.bytes_per_token
        self._core = core
        self._vocab_size = bundle.manifest.model.vocab_size

    @property
    def free_tokens(self) -> int:
        """Tokens of `capacity_tokens` in pages that no session uses now."""
        return self._core.free_tokens

    def session(self) -> Session:
        """An empty session."""
        return Session(self, self._core.session())

    def load_session(self, path: Path | str) -> Session:
        """A session that `Session.save` wrote; it goes on exactly as that one would have.

        Raises:
            SessionError: the file cannot be read, is damaged, of another version or of another
                bundle (nothing of it is used then), or does not fit into the cache or the context.
        """
        return Session(self, self._core.load_session(os.fsencode(path)))

    def generate(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        cancellation: Cancellation | None = None,
    ) -> GenerationResult:
        """Continue a prompt. Arguments and errors: as `stream`."""
        generation = self.stream(prompt, options, session=session, cancellation=cancellation)
        for _ in generation:
            pass
        return generation.result

    def stream(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        cancellation: Cancellation | None = None,
    ) -> Generation:
        """Continue a prompt, one event a token.

        Args:
            prompt: text, or token ids.
            options: None: greedy, 256 tokens.
            session: its cache is used again for as much of the prompt as it holds already, and the
                rest is forgotten; afterwards it holds the prompt and all new tokens but the last.
                None: a session of its own.
            cancellation: what another thread stops it with, at once.

        Raises:
            UsageError: the prompt is empty, or holds ids that the model does not have.
            SessionError: the prompt does not fit into the cache or the model's context, or
                something else changes the session before the end.
            TokenizerError: text is wanted of a bundle without a tokenizer.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        chosen = options or GenerationOptions()
        return Generation(self, self.check_ids(ids), chosen, session, cancellation)

    def check_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        """The ids as a list.

        Raises:
            UsageError: there are none, or they are not token ids of this model.
        """
        array = token_array(ids)
        self._core.check_tokens(array)
        flat: list[int] = array.tolist()
        return flat

    def step(
        self,
        requests: Sequence[tuple[Session, Sequence[int]]],
        *,
        all_logits: bool = False,
        positions: Sequence[Sequence[int]] | None = None,
        cancellation: Cancellation | None = None,
    ) -> list[Logits]:
        """Append tokens to several sessions at once, as many to each as it is given.

        Args:
            requests: sessions, each at most once, and their new tokens.
            all_logits: give the logits after every new token.
            positions: give them after these, counted in the new tokens of each request.
            cancellation: what another thread stops it with, at once.

        Returns:
            For each request the logits after its last token, [vocab_size]; with all_logits or
            positions [number of positions, vocab_size].

        Raises:
            UsageError: tokens or positions out of range, a session twice or of another engine.
            SessionError: a session is closed, a generation is under way on it, the tokens do not
                fit into the model's context or the cache, or the call was cancelled. Then no
                session has changed.
        """
        if all_logits and positions is not None:
            raise UsageError("all_logits and positions exclude each other")
        if positions is not None and len(positions) != len(requests):
            raise UsageError(
                "every request needs its list of positions",
                found=len(positions),
                allowed=len(requests),
            )
        given = []
        results = []
        for index, (session, ids) in enumerate(requests):
            array = token_array(ids)
            if all_logits:
                wanted = np.arange(len(array))
            elif positions is None:
                wanted = np.array([len(array) - 1])
            else:
                wanted = np.array(positions[index], dtype=np.int64)
            logits = np.empty((len(wanted), self._vocab_size), dtype=np.float32)
            given.append((session.core, array, wanted, logits))
            results.append(logits)
        self._core.step(given, None if cancellation is None else cancellation.core)
        if all_logits or positions is not None:
            return results
        return [logits[0] for logits in results]
