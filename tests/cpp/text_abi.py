"""The functions of mla_deploy/text.h for Python, by ctypes, in the library of core_abi.py."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cpp.core_abi import AbiError, load_api

FULL = os.environ.get("MLA_DEPLOY_FULL") == "1"
"""Whether tests take all of Unicode and whole corpora, which takes many minutes, or samples."""

# All that Unicode has assigned, and every 97th of what is left.
CHARACTERS = [
    chr(code)
    for code in range(0x110000)
    if not 0xD800 <= code <= 0xDFFF
    and (code < 0x33480 or 0xE0000 <= code < 0xE0200 or code % 97 == 0)
]


def some_characters() -> list[str]:
    """Latin and others of the first blocks, and a fresh sample of all."""
    if FULL:
        return CHARACTERS
    return CHARACTERS[:0x600] + [CHARACTERS[i] for i in torch.randperm(len(CHARACTERS))[:3000]]


@cache
def load_text() -> ctypes.CDLL:
    """The library, or the test is skipped."""
    lib = load_api().raw
    handle, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    ids, count = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_size_t)
    out, piece = ctypes.POINTER(handle), ctypes.POINTER(ctypes.c_void_p)
    signatures: dict[str, list[Any]] = {
        "mla_tokenizer_open": [text, out],
        "mla_tokenizer_open_bytes": [text, size, out],
        "mla_tokenizer_close": [handle],
        "mla_tokenizer_vocab_size": [handle, ctypes.POINTER(ctypes.c_uint32)],
        "mla_tokenizer_token_id": [handle, text, size, ids],
        "mla_tokenizer_encode": [handle, text, size, ctypes.c_int, ids, size, count],
        "mla_tokenizer_decode": [handle, ids, size, ctypes.c_int, ctypes.c_void_p, size, count],
        "mla_text_stream_create": [handle, ctypes.c_int, out],
        "mla_text_stream_push": [handle, ctypes.c_int32, piece, count],
        "mla_text_stream_flush": [handle, piece, count],
        "mla_text_stream_destroy": [handle],
    }
    for name, arguments in signatures.items():
        getattr(lib, name).argtypes = arguments
    return lib


def call(name: str, *arguments: Any) -> None:
    load_text()
    load_api().call(name, *arguments)


class CppTokenizer:
    """A tokenizer.json by path, or its bytes."""

    def __init__(self, source: Path | bytes | str) -> None:
        self.handle = ctypes.c_void_p()
        if isinstance(source, Path):
            call("mla_tokenizer_open", str(source).encode(), ctypes.byref(self.handle))
        else:
            data = source.encode() if isinstance(source, str) else source
            call("mla_tokenizer_open_bytes", data, len(data), ctypes.byref(self.handle))
        # Of one's own, or garbage collection could come after the library is gone.
        self._close = load_text().mla_tokenizer_close

    def __del__(self) -> None:
        if self.handle and hasattr(self, "_close"):
            self._close(self.handle)

    def close(self) -> None:
        call("mla_tokenizer_close", self.handle)
        self.handle = ctypes.c_void_p()

    @property
    def vocab_size(self) -> int:
        size = ctypes.c_uint32()
        call("mla_tokenizer_vocab_size", self.handle, ctypes.byref(size))
        return size.value

    def token_id(self, content: str) -> int:
        token = ctypes.c_int32()
        data = content.encode()
        call("mla_tokenizer_token_id", self.handle, data, len(data), ctypes.byref(token))
        return token.value

    def encode_bytes(self, text: bytes, special: bool = False) -> list[int]:
        capacity = len(text) + 16
        while True:
            ids = (ctypes.c_int32 * capacity)()
            count = ctypes.c_size_t()
            arguments = (text, len(text), int(special), ids, capacity, ctypes.byref(count))
            try:
                call("mla_tokenizer_encode", self.handle, *arguments)
            except AbiError as error:
                if error.status != "BUFFER_TOO_SMALL":
                    raise
                capacity = count.value
                continue
            return ids[: count.value]

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.encode_bytes(text.encode(), special)

    def decode_bytes(self, ids: Sequence[int], skip_special: bool = False) -> bytes:
        array = (ctypes.c_int32 * len(ids))(*ids)
        capacity = 8 * len(ids) + 16
        while True:
            text = ctypes.create_string_buffer(capacity)
            length = ctypes.c_size_t()
            arguments = (array, len(ids), int(skip_special), text, capacity, ctypes.byref(length))
            try:
                call("mla_tokenizer_decode", self.handle, *arguments)
            except AbiError as error:
                if error.status != "BUFFER_TOO_SMALL":
                    raise
                capacity = length.value
                continue
            return ctypes.string_at(text, length.value)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self.decode_bytes(ids, skip_special).decode()

    def stream(self, skip_special: bool = False) -> CppStream:
        return CppStream(self, skip_special)


class CppStream:
    def __init__(self, tokenizer: CppTokenizer, skip_special: bool) -> None:
        self.handle = ctypes.c_void_p()
        arguments = (int(skip_special), ctypes.byref(self.handle))
        call("mla_text_stream_create", tokenizer.handle, *arguments)
        self._destroy = load_text().mla_text_stream_destroy

    def __del__(self) -> None:
        if self.handle and hasattr(self, "_destroy"):
            self._destroy(self.handle)

    def destroy(self) -> None:
        call("mla_text_stream_destroy", self.handle)
        self.handle = ctypes.c_void_p()

    def _piece(self, name: str, *arguments: Any) -> bytes:
        text, length = ctypes.c_void_p(), ctypes.c_size_t()
        call(name, self.handle, *arguments, ctypes.byref(text), ctypes.byref(length))
        return ctypes.string_at(text.value, length.value) if length.value else b""

    def push(self, token: int) -> bytes:
        return self._piece("mla_text_stream_push", token)

    def flush(self) -> bytes:
        return self._piece("mla_text_stream_flush")

    def pieces(self, ids: Iterable[int]) -> Iterator[bytes]:
        for token in ids:
            yield self.push(token)
        yield self.flush()
