"""From a text file to the windows that are scored."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_deploy.errors import UsageError
from mla_deploy.tokenizer import Tokenizer

DEFAULT_WINDOW = 512
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        start: what the tokenizer puts before every text, usually nothing or one token.
        ids: the text itself.
        token_bytes: bytes of text that each token stands for.
    """

    start: tuple[int, ...]
    ids: tuple[int, ...]
    token_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A stretch of the text that is scored in one go.

    Attributes:
        ids: the tokens the model sees, the start included.
        first: position in `ids` of the first token that is scored; all after it are too.
        offset: position in the text of that token.
    """

    ids: tuple[int, ...]
    first: int
    offset: int

    def scored_from(self, seen: int) -> Window | None:
        """Without the predictions that see fewer tokens; None if that leaves none."""
        skipped = max(0, seen - self.first)
        if self.first + skipped >= len(self.ids):
            return None
        return Window(self.ids, self.first + skipped, self.offset + skipped)


def read_text(path: Path | str) -> str:
    """A UTF-8 text file, line ends as they are.

    Raises:
        UsageError: not there, not a file, empty, or not UTF-8.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"the text {file} cannot be read", found=error.strerror, hint="name a UTF-8 text file"
        ) from None
    text = decode_text(raw, f"the text {file}")
    if not text.strip():
        raise UsageError(
            f"the text {file} is empty", found=f"{len(raw)} bytes", hint="name a UTF-8 text file"
        )
    return text


def decode_text(raw: bytes, what: str) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Raises:
        UsageError: they are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what} is not UTF-8",
            found=f"byte 0x{raw[error.start]:02x} at offset {error.start}",
            hint="convert it first, for instance: iconv -f LATIN1 -t UTF-8 FILE",
        ) from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line of a file of JSON lines, gzipped if its name ends so.

    Raises:
        UsageError: not there, too large, or not JSON.
    """
    is_gzip = path.suffix == ".gz"
    try:
        with path.open("rb") as stored, gzip.open(stored) if is_gzip else stored as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError) as error:
        raise UsageError(
            f"{path} cannot be read",
            found=getattr(error, "strerror", None) or error,
            hint="name a file of JSON lines, which may be compressed as .gz",
        ) from None
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is too large", allowed=f"{MAX_FILE_BYTES} bytes")
    for number, line in enumerate(decode_text(raw, str(path)).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UsageError(
                    f"{path}, line {number}, is not JSON",
                    found=error,
                    allowed="an object on each line",
                ) from None


def encode_text(tokenizer: Tokenizer, text: str, max_tokens: int | None = None) -> Corpus:
    """The text as tokens, at most the first `max_tokens`.

    Raises:
        UsageError: fewer than two tokens: there is nothing to predict.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
    if len(ids) < 2:
        raise UsageError(
            "the text is too short to be scored",
            found=f"{len(ids)} tokens",
            allowed="2 tokens or more",
        )
    lengths = (len(tokenizer.token_bytes(token_id)) for token_id in ids)
    return Corpus(_start_tokens(tokenizer), tuple(ids), tuple(lengths))


def _start_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text; what it may put behind one is of no interest here."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    before = next(
        (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare), 0
    )
    return tuple(whole[:before])


def windows(corpus: Corpus, window: int, stride: int) -> Iterator[Window]:
    """The sliding windows over a text.

    Window k starts at token k * stride of the text and is `window` tokens long, the start included.
    A token is scored in the first window that holds it with at least one token before it, so with
    `stride < window` every token but the first of the text is scored once, and from the second
    window on with at least `window - stride` tokens before it; with `stride = window` the first of
    each window has nothing before it and is not scored, unless the tokenizer gives it a start.
    """
    start = corpus.start
    room = window - len(start)
    scored = 0
    for begin in range(0, len(corpus.ids), stride):
        end = min(begin + room, len(corpus.ids))
        first = max(scored, begin + (0 if start else 1))
        if first < end:
            yield Window((*start, *corpus.ids[begin:end]), first - begin + len(start), first)
        scored = end
        if end == len(corpus.ids):
            return


def check_window(
    window: int | None, stride: int | None, contexts: Sequence[int], start: int
) -> tuple[int, int]:
    """The window and stride to use; without a wish, `min(512, context)` and the whole window.

    Args:
        contexts: the longest windows of the models that take part.
        start: tokens that the tokenizer puts before each window.

    Raises:
        UsageError: out of range.
    """
    longest = min(contexts)
    chosen = min(DEFAULT_WINDOW, longest) if window is None else window
    if not 2 + start <= chosen <= longest:
        raise UsageError(
            "the window is out of range",
            found=f"{chosen} tokens",
            allowed=f"{2 + start} to {longest}, the model's context",
            hint="give another --window",
        )
    step = chosen - start if stride is None else stride
    if not 1 <= step <= chosen - start:
        raise UsageError(
            "the stride is out of range: tokens would be left out",
            found=f"{step} tokens",
            allowed=f"1 to {chosen - start}",
            hint="give another --stride",
        )
    return chosen, step
