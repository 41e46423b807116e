"""Running a bundle of TensorRT engines: the session API of `engine.py` over `tensorrt_graph.py`.

An engine computes one sequence at a time, and its GPU memory holds the cache of one. So an engine
here has one open session; a step for several sessions, forks and files of sessions are refused.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mla_deploy.bundle import Bundle
from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime.closing import Closing
from mla_deploy.runtime.generation import GenerationResult
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.tensorrt_device import open_engine
from mla_deploy.runtime.tensorrt_generation import TensorRtGeneration
from mla_deploy.runtime.tensorrt_graph import Logits, TensorRtGraph
from mla_deploy.tokenizer import TOKENIZER, Tokenizer


def load_tensorrt(bundle: Bundle, max_tokens: int | None) -> TensorRtEngine:
    """Load a bundle that was opened.

    Raises:
        UsageError, BundleError: as `tensorrt_device.open_engine`.
    """
    device, execution = open_engine(bundle)
    return TensorRtEngine(bundle, TensorRtGraph(bundle.manifest, device, execution, max_tokens))


@dataclass(frozen=True)
class EngineKernels:
    """What computes latent attention, in place of `Kernels`."""

    name: str = "TensorRT"
    library: None = None
    reason: str = "the engine brings its own"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class TensorRtEngine:
    """A loaded bundle; attributes and methods as those of `Engine`."""

    def __init__(self, bundle: Bundle, graph: TensorRtGraph) -> None:
        self.bundle = bundle
        self.lock = threading.RLock()
        self._graph = graph
        self._open: TensorRtSession | None = None
        self.capacity_tokens = graph.capacity
        self.kv_bytes_per_token = graph.bytes_per_token
        self.kernels = EngineKernels()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; TokenizerError if it has none."""
        return Tokenizer.open(self.bundle)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle brings a tokenizer."""
        return self.bundle.has(TOKENIZER)

    @functools.cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the manifest and by the tokenizer."""
        ids = frozenset(self.bundle.manifest.model.eos_token_ids)
        return ids.union(self.tokenizer.eos_token_ids) if self.has_tokenizer else ids

    def session(self) -> TensorRtSession:
        """An empty session; SessionError while another is open."""
        with self.lock:
            if self._open is not None and not self._open.closed:
                raise SessionError(
                    "a TensorRT bundle has one session at a time", hint="close the other first"
                )
            self._open = TensorRtSession(self)
            return self._open

    def generate(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: TensorRtSession | None = None,
    ) -> GenerationResult:
        """Continue a prompt. Arguments and errors: as `Engine.stream`."""
        generation = self.stream(prompt, options, session=session)
        for _ in generation:
            pass
        return generation.result

    def stream(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        *,
        session: TensorRtSession | None = None,
    ) -> TensorRtGeneration:
        """Continue a prompt, one event a token. Arguments and errors: as `Engine.stream`."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if session is not None:
            session.check_open()
        return TensorRtGeneration(
            self, self.check_ids(ids), options or GenerationOptions(), session
        )

    def check_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        """The ids as a list; UsageError unless they are token ids of this model."""
        vocab_size = self.bundle.manifest.model.vocab_size
        array = np.asarray(ids)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise UsageError(
                "tokens must be a flat list of integers", found=repr(ids)[:80], allowed="token ids"
            )
        outside = array[(array < 0) | (array >= vocab_size)]
        if len(outside):
            raise UsageError(
                "a token is not in the model's vocabulary",
                found=outside[0],
                allowed=f"0 to {vocab_size - 1}",
                hint="use the tokenizer of the bundle",
            )
        flat: list[int] = array.tolist()
        return flat

    def step(
        self,
        requests: Sequence[tuple[TensorRtSession, Sequence[int]]],
        *,
        all_logits: bool = False,
        positions: Sequence[Sequence[int]] | None = None,
    ) -> list[Logits]:
        """Append tokens to the session. Arguments, result and errors: as `Engine.step`."""
        if len(requests) != 1:
            raise UsageError(
                "an engine computes one sequence at a time", found=len(requests), allowed="1"
            )
        if all_logits and positions is not None:
            raise UsageError("all_logits and positions exclude each other")
        session, ids = requests[0]
        with self.lock:
            session.check_open()
            checked = self.check_ids(ids)
            if len(checked) > session.room:
                raise SessionError(
                    "the cache is full, or the model's context too short",
                    found=f"{session.length} tokens in the session and {len(checked)} new ones",
                    allowed=f"{session.room} new ones",
                    hint="shorten the prompt, or rewind the session",
                )
            wanted = [len(checked) - 1]
            if all_logits:
                wanted = list(range(len(checked)))
            elif positions is not None:
                wanted = list(positions[0])
                if any(not 0 <= at < len(checked) for at in wanted):
                    raise UsageError(
                        "a position is not among the new tokens",
                        found=wanted,
                        allowed=f"0 to {len(checked) - 1}",
                    )
            order = sorted(set(wanted))
            rows = self._graph.append(checked, session.length, order)
            session.appended(checked)
            logits = rows[[order.index(at) for at in wanted]]
            return [logits if all_logits or positions is not None else logits[0]]

    def repeat(self, whole: int, length: int) -> None:
        """For sessions: fill the cache with copies."""
        self._graph.repeat(whole, length)

    def close(self) -> None:
        """Free the GPU's memory."""
        self._graph.close()


class TensorRtSession(Closing):
    """The sequence in the cache; methods as those of `Session`."""

    def __init__(self, engine: TensorRtEngine) -> None:
        self.engine = engine
        self._tokens: list[int] = []
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return tuple(self._tokens)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def room(self) -> int:
        """Tokens that can be added now."""
        context = self.engine.bundle.manifest.model.max_position_embeddings
        return max(0, min(context, self.engine.capacity_tokens) - self.length)

    @property
    def cache_bytes(self) -> int:
        """Bytes of this session's rows."""
        return int(self.length * self.engine.kv_bytes_per_token)

    def prefill(self, ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        """Append tokens; the logits after the last one, or after each."""
        return self.engine.step([(self, ids)], all_logits=all_logits)[0]

    def decode(self, token_id: int) -> Logits:
        """Append one token; the logits after it, [vocab_size]."""
        return self.prefill([token_id])

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.check_open()
        if not 0 <= length <= self.length:
            raise SessionError(
                "a session cannot be rewound to there", found=length, allowed=f"0 to {self.length}"
            )
        del self._tokens[length:]

    def rewind_to_prefix(self, ids: Sequence[int]) -> int:
        """Forget what differs from `ids`; how many tokens of them stay."""
        same = 0
        for held, wanted in zip(self._tokens, ids, strict=False):
            if held != wanted:
                break
            same += 1
        self.rewind(same)
        return same

    def fill_by_copies(self, length: int) -> None:
        """Grow to `length` tokens without computing: the rows there are repeated. For measuring."""
        self.check_open()
        whole = self.length
        if length <= whole:
            return
        if not whole or length - whole > self.room:
            raise SessionError(
                "the cache cannot be filled", found=f"{length} tokens", allowed=f"1 to {self.room}"
            )
        self.engine.repeat(whole, length)
        self._tokens = (self._tokens * -(-length // whole))[:length]

    def close(self) -> None:
        """Give the cache back. Closing again does nothing."""
        if not self._closed:
            self.rewind(0)
            self._closed = True

    def check_open(self) -> None:
        """Raise a SessionError if the session is closed."""
        if self._closed:
            raise SessionError("the session is closed", hint="make another with Engine.session()")

    def appended(self, ids: Sequence[int]) -> None:
        """For the engine: note tokens whose cache was written."""
        self._tokens += ids
