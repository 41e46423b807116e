"""A model in memory: the graph, the cache that its sessions share, and the tokenizer.

`CoreEngine` computes with ONNX Runtime in C++, `TensorRtEngine` with TensorRT.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mla_deploy.errors import UsageError
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.bundle_text import BundleText
from mla_deploy.runtime.cancellation import Cancellation
from mla_deploy.runtime.generation import Generation, GenerationResult, TokenSource
from mla_deploy.runtime.native import Integers, Logits, token_array
from mla_deploy.runtime.ops import Kernels
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.session import Session

Request = tuple[Session, Integers, Integers]
"""A session, its new tokens, and the positions among them whose logits are wanted."""


class Engine(BundleText, abc.ABC):
    """A loaded bundle. Made by `load`.

    It computes without Python's lock. Sessions may be used from several threads; the graph runs one
    step at a time.

    Attributes:
        bundle: what was loaded.
        capacity_tokens: tokens that the cache holds, of all sessions together.
        kv_bytes_per_token: bytes of cache for one token in all layers, scales and zeros included,
            counted on the arrays themselves.
        kernels: what computes latent attention.
    """

    batches: ClassVar[bool]
    """Whether a step computes its sessions together, and not one after the other."""
    saves_sessions: ClassVar[bool]
    """Whether `Session.save` and `load_session` work."""

    capacity_tokens: int
    kv_bytes_per_token: int
    kernels: Kernels

    @property
    @abc.abstractmethod
    def free_tokens(self) -> int:
        """Tokens of `capacity_tokens` in pages that no session uses now."""

    @abc.abstractmethod
    def session(self) -> Session:
        """An empty session.

        Raises:
            SessionError: the engine holds one session at a time, and another is open.
        """

    @abc.abstractmethod
    def load_session(self, path: Path | str) -> Session:
        """A session that `Session.save` wrote; it goes on exactly as that one would have.

        Raises:
            SessionError: the file cannot be read, is damaged, of another version or of another
                bundle (nothing of it is used then), or does not fit into the cache or the context;
                or the engine knows no such files (`saves_sessions`).
        """

    @abc.abstractmethod
    def check_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        """The ids as a list.

        Raises:
            UsageError: there are none, or they are not token ids of this model.
        """

    @abc.abstractmethod
    def token_source(
        self, session: Session, prompt: list[int], options: GenerationOptions
    ) -> TokenSource:
        """What makes the tokens behind a prompt, for `Generation`."""

    @abc.abstractmethod
    def append(
        self, requests: Sequence[Request], cancellation: _runtime.Cancellation | None
    ) -> list[Logits]:
        """What `step` does, with requests brought into form.

        Returns:
            For each request logits [positions, vocab_size].
        """

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
            raise UsageError("all_logits and positions exclude each other", hint="give one of them")
        if positions is not None and len(positions) != len(requests):
            raise UsageError(
                "every request needs its list of positions",
                found=len(positions),
                allowed=len(requests),
            )
        given: list[Request] = []
        for index, (session, ids) in enumerate(requests):
            array = token_array(ids)
            if all_logits:
                wanted = np.arange(len(array))
            elif positions is None:
                wanted = np.array([len(array) - 1])
            else:
                wanted = np.array(positions[index], dtype=np.int64)
            given.append((session, array, wanted))
        logits = self.append(given, None if cancellation is None else cancellation.core)
        if all_logits or positions is not None:
            return logits
        return [rows[0] for rows in logits]
