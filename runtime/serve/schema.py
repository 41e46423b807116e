"""What requests may hold.

A field that OpenAI knows and we do not is refused, unless it has the value that changes nothing; so
is one that nobody knows. Fields that by definition do not change the answer are taken and ignored.
Types are strict: "1" is no number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mla_deploy.errors import UsageError
from mla_deploy.runtime.options import GenerationOptions
from mla_deploy.runtime.serve.errors import ApiError, in_one_line

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, of /v1/completions; a chat goes on to the end of the context."""

Zero = Annotated[float, Field(ge=0, le=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[int], Field(min_length=1)]


class Part(BaseModel):
    """A model that refuses what it does not name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Part):
    """How a stream is sent."""

    include_usage: bool = False


class TextFormat(Part):
    """The answer is text."""

    type: Literal["text"]


class Sampling(Part):
    """What both kinds of requests may hold."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ours.
    top_k: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    # Only as they change nothing.
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # They never change the answer.
    user: str | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most, as asked for."""
        return self.max_tokens

    def check(self) -> None:
        """Raise an ApiError if fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")

    def options(self, limit: int) -> GenerationOptions:
        """The options of a generation of at most `limit` tokens.

        Raises:
            ApiError: a value outside the engine's range.
        """
        given = {
            name: value
            for name in ("top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        stop = [] if self.stop is None else self.stop
        try:
            return GenerationOptions(
                max_tokens=limit,
                temperature=1.0 if self.temperature is None else self.temperature,
                seed=None if self.seed is None else self.seed % (1 << 64),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                **given,
            )
        except UsageError as error:
            raise ApiError(400, in_one_line(error)) from None


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt; a list of one is that one.

        Raises:
            ApiError: there are several.
        """
        match self.prompt:
            case str(text) | [str(text)]:
                return text
            case [list(ids)]:
                return ids
            case [int(), *_]:
                return [token for token in self.prompt if isinstance(token, int)]
        message = f"prompt holds {len(self.prompt)} prompts; send a request for each"
        raise ApiError(400, message, param="prompt")


class TextPart(Part):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Part):
    """One turn of a conversation. The null fields are those of an answer that is sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def as_template_reads_it(self) -> dict[str, str]:
        """As chat templates know it: content is a text, and a developer is the system."""
        parts = self.content if isinstance(self.content, list) else []
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in parts)
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None
    # Only as they change nothing.
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # They never change the answer.
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def token_limit(self) -> int | None:
        """max_completion_tokens is the newer name."""
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens are two names of one limit; send one"
            raise ApiError(400, message, param="max_tokens")


RequestKind = TypeVar("RequestKind", bound=Sampling)


def parse(kind: type[RequestKind], body: bytes) -> RequestKind:
    """Read a request.

    Raises:
        ApiError: it is no JSON, or not a request that is served.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _not_accepted(error) from None
    request.check()
    return request


def _not_accepted(error: ValidationError) -> ApiError:
    """The first of the errors; where a field may be of several types, all of that field."""
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "json_invalid" or field is None:
        return ApiError(400, f"the body is not a JSON object of a request: {first['msg']}")
    if first["type"] == "extra_forbidden":
        param = ".".join(map(str, first["loc"]))
        return ApiError(400, f"{param} is not supported; leave it out", param=param)
    if first["type"] == "missing":
        param = ".".join(map(str, first["loc"]))
        return ApiError(400, f"{param} is missing", param=param)
    same = [one for one in errors if one["loc"][0] == field]
    wanted = ", or ".join(dict.fromkeys(_lower(one["msg"]) for one in same))
    found = repr(first["input"])
    shown = found if len(found) <= 80 else found[:77] + "..."
    return ApiError(400, f"{field} {wanted}; found: {shown}", param=field)


def _lower(message: str) -> str:
    return message.removeprefix("Input ").removeprefix("Value ")
