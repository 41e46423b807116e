"""llama.cpp behind `peer_worker.py`, through llama-cpp-python's own ctypes.

python benchmarks/peer_llama_cpp.py GGUF THREADS MAX_TOKENS CACHE FLASH

CACHE is f16, q8_0 or q4_0; FLASH is 1 or 0 (a quantised cache needs 1).
"""

from __future__ import annotations

import ctypes
import struct
import sys

import llama_cpp as llama
from peer_worker import Engine, serve

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
BATCH = 512
SEQUENCE = 0


class LlamaCpp(Engine):
    """A context with one sequence."""

    def __init__(self, path: str, threads: int, max_tokens: int, cache: str, flash: bool) -> None:
        self._log = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        chosen = llama.llama_context_default_params()
        chosen.n_ctx = max_tokens
        chosen.n_batch = chosen.n_ubatch = BATCH
        chosen.n_threads = chosen.n_threads_batch = threads
        chosen.flash_attn_type = int(flash)
        chosen.type_k = chosen.type_v = TYPES[cache]
        self._context = llama.llama_init_from_model(self._model, chosen)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context with cache {cache}, flash {flash}")
        self._memory = llama.llama_get_memory(self._context)
        vocabulary = llama.llama_model_get_vocab(self._model)
        self.vocab_size = llama.llama_vocab_n_tokens(vocabulary)
        self.append([1, 2, 3, 4])
        self.bytes_per_token = self._row_bytes()
        self.rewind(0)

    def append(self, tokens: list[int]) -> list[float]:
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            array = (llama.llama_token * len(part))(*part)
            status = llama.llama_decode(self._context, llama.llama_batch_get_one(array, len(part)))
            if status:
                raise SystemExit(f"llama_decode failed with status {status}")
        return llama.llama_get_logits_ith(self._context, -1)[: self.vocab_size]

    def rewind(self, length: int) -> None:
        llama.llama_memory_seq_rm(self._memory, SEQUENCE, length, -1)

    def _state(self) -> bytes:
        size = llama.llama_state_seq_get_size(self._context, SEQUENCE)
        buffer = (ctypes.c_uint8 * size)()
        written = llama.llama_state_seq_get_data(self._context, buffer, size, SEQUENCE)
        return bytes(buffer)[:written]

    def _row_bytes(self) -> float:
        return sum(len(rows) for _, rows in _State(self._state()).layers) / 4

    def fill(self, length: int) -> None:
        state = _State(self._state()).repeated(length)
        self.rewind(0)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        if not llama.llama_state_seq_set_data(self._context, buffer, len(state), SEQUENCE):
            raise SystemExit("llama.cpp refuses the lengthened state")


class _State:
    """The serialised cache of one sequence: a header, the cells, and the rows of each layer.

    magic, sequence, streams, cells; for each cell position, 1, sequence; transposed, layers; for
    each layer type, bytes of a row, rows of keys; then the same of values, which an absorbed MLA
    cache does not have.
    """

    CELL = struct.Struct("<iIi")

    def __init__(self, state: bytes) -> None:
        magic, sequence, self.streams, self.cells = struct.unpack_from("<IiII", state)
        self.head = struct.pack("<IiI", magic, sequence, self.streams)
        self.sequence = sequence
        at = 16 + self.cells * self.CELL.size
        self.transposed, self.count = struct.unpack_from("<II", state, at)
        at += 8
        self.layers: list[tuple[bytes, bytes]] = []
        while at < len(state):
            (row,) = struct.unpack_from("<Q", state, at + 4)
            start = at + 12
            end = start + row * self.cells
            self.layers.append((state[at:start], state[start:end]))
            at = end
        is_known = len(self.layers) == self.count * (1 if self.transposed else 2)
        is_known |= len(self.layers) == self.count  # keys only
        if at != len(state) or self.streams != 1 or not is_known:
            raise SystemExit("llama.cpp's state has another layout than this script knows")

    def repeated(self, length: int) -> bytearray:
        """The state of a sequence of `length` tokens with the same rows over and over."""
        state = bytearray(self.head + struct.pack("<I", length))
        for position in range(length):
            state += self.CELL.pack(position, 1, self.sequence)
        state += struct.pack("<II", self.transposed, self.count)
        for head, rows in self.layers:
            row = len(rows) // self.cells
            state += head + (rows * -(-length // self.cells))[: row * length]
        return state


if __name__ == "__main__":
    path, threads, max_tokens, cache, flash = sys.argv[1:]
    serve(lambda: LlamaCpp(path, int(threads), int(max_tokens), cache, flash == "1"))
