"""A conversation: messages, and a session that has computed them already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mla_deploy.errors import SessionError, TokenizerError
from mla_deploy.output import whole_file
from mla_deploy.runtime.cancellation import Cancellation
from mla_deploy.runtime.closing import Closing
from mla_deploy.runtime.engine import Engine
from mla_deploy.runtime.generation import Generation, GenerationResult
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.writing import Event

FORMAT, VERSION = "mla-deploy-conversation", 1
CACHE_SUFFIX = ".session"
"""Of the file with the cache, beside that with the messages."""
NEARLY_FULL = 8
"""The context is nearly full when less than this fraction of it is left."""

Messages = list[dict[str, str]]


class Conversation(Closing):
    """Turns of a user and of the model, in one session of an engine.

        with Conversation(load("bundle"), GenerationOptions(max_tokens=512)) as talk:
            for event in talk.send("Who are you?"):
                print(event.text, end="", flush=True)

    Each turn sends the whole conversation through the chat template. The session knows the tokens
    that it has computed, so that only what is new goes through the model. For one thread at a time.

    Attributes:
        options: of the answers to come; may be replaced.
    """

    def __init__(
        self, engine: Engine, options: GenerationOptions | None = None, *, system: str | None = None
    ) -> None:
        """
        Args:
            engine: what answers. The conversation takes a session of it.
            options: None: greedy, 256 tokens an answer.
            system: what the model is told before the first turn.

        Raises:
            TokenizerError: the bundle has no tokenizer or no chat template, or the template
                refuses such a conversation.
        """
        if not engine.tokenizer.has_chat_template:
            raise TokenizerError(
                f"the bundle {engine.bundle.path} cannot hold a conversation",
                found="no chat template",
                hint="continue a plain text with `mla-deploy run BUNDLE PROMPT`, or export from a "
                "checkpoint that has a chat_template.jinja",
            )
        self.options = options or GenerationOptions()
        self._engine = engine
        self._messages: Messages = [] if system is None else [_message("system", system)]
        self._answer: Answer | None = None
        self._result: GenerationResult | None = None
        self._prompt(self._messages, "?")  # what the template refuses is refused now
        self._session = engine.session()

    @property
    def messages(self) -> Messages:
        """What was said, oldest first: `role` (system, user, assistant) and `content`."""
        return [dict(message) for message in self._messages]

    @property
    def turns(self) -> int:
        """Questions that were answered, or are being answered."""
        return sum(message["role"] == "user" for message in self._messages)

    @property
    def result(self) -> GenerationResult | None:
        """The last answer with its statistics; None before the first, and after `clear`, `undo` and
        `load`."""
        return self._answer.result if self._answer is not None else self._result

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self._session.length

    @property
    def room(self) -> int:
        """Tokens that the model's context and the engine's cache have left."""
        return self._session.room

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache in use."""
        return self._session.cache_bytes

    @property
    def is_nearly_full(self) -> bool:
        """Whether less than an eighth of the context is left."""
        return self.room * NEARLY_FULL < self.room + self.tokens

    def send(self, text: str, *, cancellation: Cancellation | None = None) -> Answer:
        """Say something; the answer comes as an iterator of events, one a token.

        The turn counts once there is an answer. If there is none, because it was cancelled before
        its first word or an error came first, the conversation is as it was; what there is of an
        answer that was cut off is kept.

        Args:
            cancellation: what another thread, or a handler of Ctrl-C, stops the answer with.

        Raises:
            SessionError: the conversation is closed, or does not fit into the context any more.
            TokenizerError: the chat template refuses the conversation.
        """
        self._begin()
        prompt = self._prompt(self._messages, text)
        self._check_room(prompt)
        generation = self._engine.stream(
            prompt, self.options, session=self._session, cancellation=cancellation
        )
        answer = Answer(self, generation)
        self._messages.append(_message("user", text))
        self._answer = answer
        return answer

    def undo(self) -> bool:
        """Forget the last question and its answer; False: there was none."""
        before = self.turns
        self._begin()
        if self.turns == before > 0:
            last = max(i for i, one in enumerate(self._messages) if one["role"] == "user")
            self._keep(self._messages[:last])
        return before > 0

    def clear(self) -> None:
        """Forget everything but what the model is told first."""
        self._begin()
        self._keep([one for one in self._messages[:1] if one["role"] == "system"])

    def save(self, path: Path | str) -> None:
        """Write the conversation: the messages as JSON to `path`, the cache to `path` with
        `.session` behind it, from which `load` goes on without computing it again. The cache of
        TensorRT's engines stays where it is (`Engine.saves_sessions`).

        Both files are unencrypted.

        Raises:
            OutputError: a file cannot be written.
            SessionError: the conversation is closed.
        """
        self._begin()
        path = Path(path)
        text = json.dumps(
            {"format": FORMAT, "version": VERSION, "messages": self._messages},
            indent=1,
            ensure_ascii=False,
        )
        # The messages last: they alone say what was said. A cache of other messages is only of
        # less use, as every prompt is compared with the tokens in it.
        if self._engine.saves_sessions:
            self._session.save(_cache_of(path))
        with whole_file(path) as file:
            file.write_text(text + "\n", encoding="utf-8")

    def load(self, path: Path | str) -> bool:
        """Go on with a conversation that `save` wrote, in place of this one.

        After an error this one goes on, with a cache to be computed again.

        Returns:
            Whether its cache was there too; if not, the next turn computes all of it.

        Raises:
            SessionError: a file cannot be read or is damaged, the cache is of another bundle or
                does not fit.
            TokenizerError: the chat template refuses the conversation.
        """
        self._begin()
        path = Path(path)
        messages = _read(path)
        self._prompt(messages, "?")
        cache = _cache_of(path)
        self._session.rewind(0)  # room for the other
        if is_there := self._engine.saves_sessions and cache.exists():
            try:
                loaded = self._engine.load_session(cache)
            except SessionError as error:
                raise SessionError(
                    f"the cache of the conversation {path} cannot be used: {error.what}",
                    found=error.found or cache,
                    allowed=error.allowed,
                    hint=f"remove {cache}: the messages are loaded without it, and computed again",
                ) from None
            self._session.close()
            self._session = loaded
        self._messages = messages
        self._result = None
        return is_there

    def close(self) -> None:
        """End an answer under way, and give the session back."""
        self._leave()
        self._session.close()

    def settle(self, result: GenerationResult) -> None:
        """For `Answer`: it has ended."""
        self._answer = None
        self._result = result
        is_whole = result.finish_reason not in (None, "cancelled")
        if is_whole or result.text:
            self._messages.append(_message("assistant", result.text))
        else:
            del self._messages[-1]

    def _begin(self) -> None:
        """Something else is wanted: nobody waits for an answer under way any more."""
        if self._session.closed:
            raise SessionError("the conversation is closed", hint="make another")
        self._leave()

    def _leave(self) -> None:
        if self._answer is not None:
            self._answer.close()

    def _keep(self, messages: Messages) -> None:
        """Forget all others, in the cache too."""
        same = self._prompt(messages, "?")
        self._messages = messages
        self._result = None
        self._session.rewind_to_prefix(same)

    def _prompt(self, messages: Messages, text: str) -> list[int]:
        """The ids of a conversation in which the user says `text` next."""
        return self._engine.tokenizer.encode_chat([*messages, _message("user", text)])

    def _check_room(self, prompt: Sequence[int]) -> None:
        limit = self.tokens + self.room
        if len(prompt) > limit:
            raise SessionError(
                "the conversation does not fit into the context any more",
                found=f"{len(prompt):,} tokens with this turn",
                allowed=f"{limit:,}, question and answers together",
                hint="say it in fewer words, forget the last turn (undo), or start anew (clear)",
            )


class Answer(Closing, Iterator[Event]):
    """An answer under way: an iterator of events, made by `Conversation.send`.

    To leave early, stop asking for events and `close` it, or go on with the conversation.
    """

    def __init__(
        self,
        conversation: Conversation,
        generation: Generation,
    ) -> None:
        self._conversation: Conversation | None = conversation
        self._generation = generation

    def __next__(self) -> Event:
        if self._conversation is None:
            raise StopIteration
        try:
            return next(self._generation)
        except BaseException:  # StopIteration among them
            self.close()
            raise

    def close(self) -> None:
        """Make no more tokens; what was made so far is the answer."""
        conversation, self._conversation = self._conversation, None
        if conversation is not None:
            self._generation.close()
            conversation.settle(self.result)

    @property
    def result(self) -> GenerationResult:
        """What was made so far."""
        return self._generation.result


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _cache_of(path: Path) -> Path:
    return path.with_name(path.name + CACHE_SUFFIX)


def _read(path: Path) -> Messages:
    """The messages of a file that `Conversation.save` wrote."""
    hint = "name the file that /save, or Conversation.save, wrote"
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SessionError(f"{path} cannot be read", found=error, hint=hint) from None
    fields = raw if isinstance(raw, dict) else {}
    messages = fields.get("messages")
    is_ours = (fields.get("format"), fields.get("version")) == (FORMAT, VERSION)
    if is_ours and isinstance(messages, list) and all(_is_message(one) for one in messages):
        return messages
    raise SessionError(
        f"{path} is not a conversation that this mla-deploy can read",
        found=f"{fields.get('format')}, version {fields.get('version')}",
        allowed=f"{FORMAT}, version {VERSION}, and messages of a role and a content",
        hint=hint,
    )


def _is_message(one: object) -> bool:
    return (
        isinstance(one, dict)
        and one.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in one.values())
    )
