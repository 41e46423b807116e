"""From tokens to bytes, and from bytes to text as they come.

May be imported by the runtime: needs neither torch nor transformers.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

import tokenizers

from mla_deploy.errors import TokenizerError


@dataclass(frozen=True)
class Spelling:
    """How the tokens of a vocabulary are spelt: the `decoder` of tokenizer.json."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    leading_spaces_dropped: int
    """That decoding takes off the start of a text (SentencePiece puts one there)."""

    @classmethod
    def read(cls, tokenizer: tokenizers.Tokenizer, origin: str) -> Spelling:
        """Read the decoder of a tokenizer.

        Args:
            origin: the file, for messages.

        Raises:
            TokenizerError: it is of a kind that is not known here.
        """
        state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        byte_level = byte_fallback = False
        replacements: list[tuple[str, str]] = []
        dropped = 0
        for step in state.get("decoders", [state]):
            match step:
                case {"type": "ByteLevel"}:
                    byte_level = True
                case {"type": "ByteFallback"}:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                    replacements.append((pattern, content))
                case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                    dropped = start
                case {"type": "Metaspace", "replacement": pattern}:
                    replacements.append((pattern, " "))
                    dropped = 0 if step.get("prepend_scheme") == "never" else 1
                case _:
                    raise TokenizerError(
                        f"the decoder in {origin} is not supported",
                        found=json.dumps(step) if step else "no decoder",
                        allowed="ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace",
                    )
        return cls(byte_level, byte_fallback, tuple(replacements), dropped)

    def token_bytes(self, token: str) -> bytes:
        """UTF-8 bytes of a token, perhaps only a part of a character."""
        if self.byte_level:
            table = _byte_level_table()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
        elif self.byte_fallback and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token.encode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes a text token by token: every character comes out with the token that completes it.

    A character may be spread over several tokens; its bytes wait here until it is whole. Bytes that
    cannot become a character any more come out as U+FFFD, with the next byte at the latest. What
    was put out so far is always a prefix of `Tokenizer.decode` of the tokens so far.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        skipped: Collection[int],
        leading_spaces_dropped: int,
    ) -> None:
        self._token_bytes, self._skipped = token_bytes, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spaces_to_drop = leading_spaces_dropped

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id in self._skipped:
            return ""
        return self._strip_start(self._utf8.decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for half a character, else nothing."""
        return self._strip_start(self._utf8.decode(b"", final=True))

    def _strip_start(self, text: str) -> str:
        while text and self._spaces_to_drop:
            if text[0] != " ":
                self._spaces_to_drop = 0
                break
            text = text[1:]
            self._spaces_to_drop -= 1
        return text


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """The printable characters in which byte-level BPE spells the 256 bytes (GPT-2, 2019).

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
