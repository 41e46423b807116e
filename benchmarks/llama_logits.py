"""The logits of llama.cpp with a cache of one type, for `cache_peers.py`.

    python benchmarks/llama_logits.py GGUF IDS.npy OUT.npy CACHE PREFIX CHUNK

IDS int32 [windows, length]; OUT float32 [windows, length - PREFIX, vocab]. CACHE is f16, q8_0 or
q4_0. A window is decoded CHUNK tokens at a time, so that every token reads the cache as it is
stored. Needs llama-cpp-python and numpy, and nothing of ours: it runs in the peer's environment.
Prints what llama.cpp logs about its cache.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama
import numpy as np

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
THREADS = 1


def main() -> None:
    path, ids_file, out, cache, prefix_text, chunk_text = sys.argv[1:]
    prefix, chunk = int(prefix_text), int(chunk_text)
    windows = np.load(ids_file)
    length = windows.shape[1]

    def note(_level: int, text: bytes, _data: object) -> None:
        if b"kv_cache:" in text or b"rot" in text:
            print(text.decode(errors="replace").strip())

    log = llama.llama_log_callback(note)
    llama.llama_log_set(log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    options = llama.llama_context_default_params()
    options.n_ctx = length
    options.n_batch = options.n_ubatch = chunk
    options.n_threads = options.n_threads_batch = THREADS
    options.flash_attn_type = 1  # a quantised cache needs it
    options.type_k = options.type_v = TYPES[cache]
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"llama.cpp makes no context with a cache of {cache}")
    memory = llama.llama_get_memory(context)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    found = np.empty((len(windows), length - prefix, vocabulary), dtype=np.float32)
    batch = llama.llama_batch_init(chunk, 0, 1)
    for index, ids in enumerate(windows):
        llama.llama_memory_clear(memory, True)
        for start in range(0, length, chunk):
            part = ids[start : start + chunk]
            batch.n_tokens = len(part)
            for at, token in enumerate(part):
                batch.token[at] = int(token)
                batch.pos[at] = start + at
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = 0
                batch.logits[at] = start + at >= prefix
            status = llama.llama_decode(context, batch)
            if status:
                raise SystemExit(f"llama_decode failed with status {status}")
            first = max(start, prefix)
            if first >= start + len(part):
                continue
            rows = start + len(part) - first
            logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (rows, vocabulary))
            found[index, first - prefix : first - prefix + rows] = logits
    np.save(out, found)


if __name__ == "__main__":
    main()
