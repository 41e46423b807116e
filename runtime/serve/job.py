"""One request on its way through the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mla_deploy.errors import MlaError
from mla_deploy.runtime.engine import Engine
from mla_deploy.runtime.native import Logits
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.sampling import Sampler
from mla_deploy.runtime.session import Session
from mla_deploy.runtime.writing import FinishReason, Writing


@dataclass(frozen=True)
class Piece:
    """News of a job.

    Attributes:
        text: what can be shown since the piece before.
        tokens: how many were made since then.
        finish_reason: with the last piece of a job that came to its end.
        error: with the last piece of one that did not.
        cached_tokens: of the prompt, found in the cache of prefixes.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: FinishReason | None = None
    error: MlaError | None = None
    cached_tokens: int = 0

    @property
    def is_last(self) -> bool:
        """Whether none follows."""
        return self.finish_reason is not None or self.error is not None


Listener = Callable[[Piece], None]


class Job:
    """A prompt and what has come of it. The scheduler's thread changes it, others may `cancel`.

    Attributes:
        order: jobs that came later have larger ones.
        ids: the prompt and the tokens made so far.
        session: None while it waits.
        computed: how many of `ids` the session holds.
        cached_tokens: of the prompt, found in the cache of prefixes when it was admitted first.
        cancelled: nobody wants the rest.
    """

    def __init__(
        self, engine: Engine, prompt: list[int], options: GenerationOptions, listener: Listener
    ) -> None:
        self.order = 0
        self.ids = prompt
        self.session: Session | None = None
        self.computed = 0
        self.cached_tokens = 0
        self.cancelled = False
        self.listener = listener
        self._prompt_tokens = len(prompt)
        self._most = len(prompt) + options.max_tokens
        self._context = engine.bundle.manifest.model.max_position_embeddings
        self._eos = engine.eos_token_ids
        self._sampler = Sampler(options, engine.bundle.manifest.model.vocab_size)
        self._sampler.observe(prompt)
        self._writing = Writing(engine, options.stop)

    def cancel(self) -> None:
        """Make no more tokens; from any thread."""
        self.cancelled = True

    @property
    def made_tokens(self) -> int:
        """Tokens made so far."""
        return len(self.ids) - self._prompt_tokens

    def begin(self, session: Session) -> None:
        """Go on in a session that holds a start of the ids."""
        self.session = session
        self.computed = session.length
        if self.made_tokens == 0:
            self.cached_tokens = self.computed

    def pick(self, logits: Logits) -> Piece:
        """Choose the next token.

        Raises:
            SessionError: the logits are not numbers.
        """
        token = self._sampler.pick(logits)
        self._sampler.observe((token,))
        self.ids.append(token)
        event = self._writing.event(token, self._reason(token))
        return Piece(event.text, 1, event.finish_reason, cached_tokens=self.cached_tokens)

    def _reason(self, token: int) -> FinishReason | None:
        if token in self._eos:
            return "eos"
        if len(self.ids) == self._most:
            return "length"
        # The last token needs no place in the cache.
        return "context" if len(self.ids) > self._context else None

    def out_of_room(self) -> Piece:
        """The end of a job for whose next token there is no room."""
        text = self._writing.finish()
        return Piece(text, 0, "context", cached_tokens=self.cached_tokens)

    def leave(self) -> Session | None:
        """Give up the session."""
        session, self.session, self.computed = self.session, None, 0
        return session
