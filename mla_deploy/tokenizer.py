"""Text to token ids and back, and conversations to prompts.

Read from a model's folder or a bundle: `tokenizer.json` (the `tokenizers` library's format),
`tokenizer_config.json` (names of special tokens, whether a prompt gets them), a chat template
(`chat_template.jinja`, or inside `tokenizer_config.json`) and `generation_config.json` (tokens that
end a text). All four are data of other people: they are checked, and templates run in a sandbox.

May be imported by the runtime: needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mla_deploy.bundle import Bundle
from mla_deploy.chat_template import render_template
from mla_deploy.errors import TokenizerError, UsageError
from mla_deploy.spelling import Spelling, StreamDecoder

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"

Message = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`, and whatever else the template reads."""


class Tokenizer:
    """The tokenizer of a model.

    Attributes:
        vocab_size: ids known, added tokens included; the model's may be larger (padding).
        bos_token_id: what a text starts with, if anything.
        eos_token_ids: what ends a text: `eos_token` and generation_config.json's `eos_token_id`.
        special_token_ids: ids that stand for no text; `decode` leaves them out.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        templates: Mapping[str, str],
        origin: Path,
    ) -> None:
        tokenizer.no_truncation()  # some files ask for either; a prompt is taken as it is
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._templates = templates
        self._origin = origin
        self._special_tokens = _special_tokens(config)
        self._spelling = Spelling.read(tokenizer, f"{origin / TOKENIZER}")
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._named("bos_token")
        self.eos_token_ids = self._eos_token_ids(generation_config)
        self.special_token_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        before, after = self._ends_in_file()
        self._before = _flagged(before, self.bos_token_id, config.get("add_bos_token"))
        self._after = _flagged(after, self._named("eos_token"), config.get("add_eos_token"))

    @classmethod
    def open(cls, source: Path | str | Bundle) -> Tokenizer:
        """Read the tokenizer of a folder, or of a bundle (listed files only).

        Raises:
            TokenizerError: a file is missing, broken, or asks for something not supported.
        """
        folder = source.path if isinstance(source, Bundle) else Path(source)

        def find(name: str) -> Path | None:
            if isinstance(source, Bundle):
                return source.file(name) if source.has(name) else None
            return folder / name if (folder / name).is_file() else None

        path = find(TOKENIZER)
        if path is None:
            raise TokenizerError(
                f"{folder} has no tokenizer",
                found=f"no {TOKENIZER}",
                hint=f"copy {TOKENIZER} and {TOKENIZER_CONFIG} there; for a model that has only a "
                "tokenizer.model, `AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)` "
                "of transformers writes them",
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the library raises plain ValueError and Exception
            raise _broken(path, error) from None
        config = _read_object(find(TOKENIZER_CONFIG))
        template_path = find(CHAT_TEMPLATE)
        return cls(
            tokenizer,
            config,
            _read_object(find(GENERATION_CONFIG)),
            _templates(config, None if template_path is None else _read_text(template_path)),
            folder,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: put around it what the files ask for, usually one token that starts
                a text: the flags `add_bos_token` and `add_eos_token`, where tokenizer_config.json
                has them, else the post-processor of tokenizer.json. Leave it out for a rendered
                chat, which spells those tokens itself.

        Raises:
            TokenizerError: the text is not valid Unicode.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise TokenizerError(
                "a text that is not valid Unicode cannot be encoded",
                found=ascii(text[:40]),
                hint="read the text as UTF-8",
            ) from None
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.stream(skip_special_tokens=skip_special_tokens)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        return StreamDecoder(self.token_bytes, skipped, self._spelling.leading_spaces_dropped)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, perhaps only a part of a character; none for unknown ids."""
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return b"" if token is None else self._spelling.token_bytes(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""
        return bool(self._templates)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """A conversation as one text, by the model's chat template.

        Args:
            messages: the turns, oldest first.
            add_generation_prompt: end with the start of the assistant's turn.
            tools: JSON schemas of functions that the model may call.
            variables: whatever else the template reads, such as `enable_thinking`.

        Raises:
            TokenizerError: there is no template, it is broken, it refuses the conversation, or it
                tries to reach outside its sandbox.
            UsageError: the conversation is not made of plain JSON values.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TokenizerError(
                f"the model in {self._origin} has no chat template",
                hint=f"give a plain prompt, or put a {CHAT_TEMPLATE} beside {TOKENIZER}",
            )
        shown = {
            **self._special_tokens,
            "documents": None,
            **variables,
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # A template sees copies made of plain values: objects have methods that could do harm.
            plain = json.loads(json.dumps(shown))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                "a conversation must be made of JSON values", found=error, allowed="dict, list, str"
            ) from None
        return render_template(self._templates[name], plain, self._origin)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> list[int]:
        """Token ids of a conversation. Arguments and errors: as `render_chat`."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        return self.encode(text, add_special_tokens=False)

    def _named(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        if token is None:
            return None
        token_id: int | None = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{self._origin / TOKENIZER_CONFIG} names a {name} that {TOKENIZER} lacks",
                found=token,
                hint="take both files from the same model",
            )
        return token_id

    def _ends_in_file(self) -> tuple[list[int], list[int]]:
        """What tokenizer.json puts before and after every text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(bare) + 1):
            end = start + len(bare)
            if whole[start:end] == bare:
                return whole[:start], whole[end:]
        return [], []

    def _eos_token_ids(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        listed = generation_config.get("eos_token_id")
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
            raise TokenizerError(
                f"{self._origin / GENERATION_CONFIG} has an eos_token_id that is no token id",
                found=listed,
                allowed="an integer or a list of them",
            )
        named = self._named("eos_token")
        # A dict, not a set: the order is kept.
        return tuple(dict.fromkeys([*([] if named is None else [named]), *ids]))


def _flagged(ids: list[int], token_id: int | None, flag: object) -> list[int]:
    """The ids with or without the token, as the flag says if there is one."""
    if not isinstance(flag, bool) or token_id is None:
        return ids
    others = [other for other in ids if other != token_id]
    return [token_id, *others] if flag else others


def _templates(config: Mapping[str, Any], file_text: str | None) -> dict[str, str]:
    """Templates by name; the usual one is "default". A file wins over the config."""
    inside = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(inside, str):
        templates["default"] = inside
    elif isinstance(inside, list):
        for entry in inside:
            match entry:
                case {"name": str(name), "template": str(template)}:
                    templates[name] = template
    if file_text is not None:
        templates["default"] = file_text
    return templates


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: the names that templates use, and their spelling."""
    named: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token"):
            match value:
                case str() | {"content": str()}:
                    named[key] = value if isinstance(value, str) else value["content"]
    return named


def _read_object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise _broken(path, error) from None
    if not isinstance(value, dict):
        raise _broken(path, f"a JSON {type(value).__name__}, not an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: object) -> TokenizerError:
    return TokenizerError(f"{path} cannot be read", found=error, hint="copy the file again")
