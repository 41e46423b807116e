"""What answers look like: whole ones, and the chunks of a stream."""

from __future__ import annotations

import abc
import secrets
import time
from typing import Any, ClassVar

from mla_deploy.runtime.writing import FinishReason


def usage(prompt: int, made: int, cached: int) -> dict[str, Any]:
    """What a request took, in tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def shown_reason(reason: FinishReason | None) -> str | None:
    """OpenAI knows two ends: the text's own, and a limit."""
    if reason is None:
        return None
    return "stop" if reason in ("eos", "stop") else "length"


class Answer(abc.ABC):
    """The answer to one request."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, *, with_usage: bool) -> None:
        """with_usage: the chunks have the field, null but in the last one."""
        head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._whole = {**head, "model": model, "object": self.whole_object}
        self._chunk = {**head, "model": model, "object": self.chunk_object}
        self._extra = {"usage": None} if with_usage else {}

    @abc.abstractmethod
    def whole_choice(self, text: str) -> dict[str, Any]:
        """The text as the choice of a whole answer holds it."""

    @abc.abstractmethod
    def chunk_choice(self, text: str) -> dict[str, Any]:
        """The text as the choice of a chunk holds it."""

    def first(self) -> dict[str, Any] | None:
        """The chunk that begins a stream, if there is one."""
        return None

    def whole(self, text: str, reason: FinishReason, used: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        choices = [_choice(self.whole_choice(text), reason)]
        return {**self._whole, "choices": choices, "usage": used}

    def chunk(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """A chunk of a stream."""
        choices = [_choice(self.chunk_choice(text), reason)]
        return {**self._chunk, "choices": choices, **self._extra}

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._chunk, "choices": [], "usage": used}


def _choice(inside: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
    return {"index": 0, **inside, "logprobs": None, "finish_reason": shown_reason(reason)}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def chunk_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first(self) -> dict[str, Any]:
        chunk = self.chunk("", None)
        chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return chunk

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def chunk_choice(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}
