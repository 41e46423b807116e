"""Encoding and decoding in C++ against the package tokenizers, one thread, in one run.

    python benchmarks/tokenizer.py [TOKENIZER.json ...] [--text FILE] [--repeats 5]

Without arguments: the shipped tokenizer, and those of the shared data where it is there. The text
is cut into documents of 64 KB. The two take turns; medians and quartiles of MB of UTF-8 a second.
tokenizers runs encode_batch_fast, which leaves out offsets, on one document at a time. Decoding is
of all ids of a document at once. A stream is fed id by id from Python, which takes most of its
time.

MLA_DEPLOY_LIBRARY names a built libmla_deploy.so; else it is built in build/tests-cpp.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers is loaded
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cpp.text_abi import CppTokenizer, load_text  # noqa: E402

SHARED = Path(os.environ.get("MLA_DEPLOY_SHARED", ROOT.parent / "shared")) / "data"
TOKENIZERS = [
    ROOT / "examples" / "models" / "tiny-mla" / "tokenizer.json",
    SHARED / "tokenizers" / "deepseek-llm-100k-hf" / "tokenizer.json",
    SHARED / "models" / "stories260K" / "tokenizer.json",
]
TEXTS = [
    SHARED / "corpora" / "wikitext-2" / "wiki.test.raw",
    SHARED / "corpora" / "sherlock.txt",
    ROOT / "examples" / "text" / "three-essays.txt",
]
DOCUMENT = 64 * 1024


class Cpp:
    """The C functions with buffers made once, so that Python's lists are not measured."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = CppTokenizer(path)
        self.ids = (ctypes.c_int32 * (2 * DOCUMENT))()
        self.text = ctypes.create_string_buffer(8 * DOCUMENT)
        self.count = ctypes.c_size_t()

    def encode(self, text: bytes) -> int:
        status = load_text().mla_tokenizer_encode(
            self.tokenizer.handle, text, len(text), 0, self.ids, len(self.ids), self.count
        )
        assert status == 0, load_text().mla_last_error()
        return self.count.value

    def decode(self, ids: ctypes.Array[ctypes.c_int32]) -> bytes:
        status = load_text().mla_tokenizer_decode(
            self.tokenizer.handle, ids, len(ids), 0, self.text, len(self.text), self.count
        )
        assert status == 0, load_text().mla_last_error()
        return ctypes.string_at(self.text, self.count.value)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(size: int, repeats: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Prints and returns the median MB/s of each; they take turns."""
    for work in works.values():
        work()
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            speeds[name].append(size / 1e6 / seconds(work))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    peer = medians["tokenizers"]
    for name, values in speeds.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(
            f"    {name:<20} {medians[name]:8.1f} MB/s  ({low:.1f} to {high:.1f})"
            f"  {medians[name] / peer:6.1f}x"
        )
    return medians


def measure(path: Path, text: bytes, repeats: int) -> None:
    print(f"{path.parent.name}: {len(text) / 1e6:.2f} MB of text")
    loads = [seconds(lambda: CppTokenizer(path)) for _ in range(3)]
    peer_loads = [seconds(lambda: Tokenizer.from_file(str(path))) for _ in range(3)]
    print(
        f"  open: C++ {statistics.median(loads) * 1e3:.0f} ms, "
        f"tokenizers {statistics.median(peer_loads) * 1e3:.0f} ms"
    )
    ours, peer = Cpp(path), Tokenizer.from_file(str(path))
    parts = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    documents = [part.decode(errors="ignore").encode() for part in parts]
    strings = [document.decode() for document in documents]
    ids = [peer.encode(string, add_special_tokens=False).ids for string in strings]
    arrays = [(ctypes.c_int32 * len(i))(*i) for i in ids]
    for document, wanted in zip(documents, ids, strict=True):
        assert ours.ids[: ours.encode(document)] == wanted, "ids differ"

    def stream() -> None:
        push, piece, size = load_text().mla_text_stream_push, ctypes.c_void_p(), ctypes.c_size_t()
        stream = ours.tokenizer.stream()
        for one in ids[:4]:
            for token in one:
                push(stream.handle, token, piece, size)

    print("  encode")
    compare(
        sum(map(len, documents)),
        repeats,
        {
            "C++": lambda: [ours.encode(document) for document in documents],
            "tokenizers": lambda: [
                peer.encode_batch_fast([string], add_special_tokens=False) for string in strings
            ],
        },
    )
    print("  decode")
    compare(
        sum(map(len, documents)),
        repeats,
        {
            "C++": lambda: [ours.decode(array) for array in arrays],
            "tokenizers": lambda: [peer.decode(one, skip_special_tokens=False) for one in ids],
        },
    )
    stream()
    tokens = sum(map(len, ids[:4]))
    each = statistics.median(seconds(stream) for _ in range(repeats)) / tokens
    print(f"  stream, from Python: {each * 1e9:.0f} ns a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizers", nargs="*", type=Path)
    parser.add_argument("--text", type=Path, action="append", help="may be given several times")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    texts = args.text or [path for path in TEXTS if path.is_file()]
    text = b"\n".join(path.read_bytes() for path in texts)
    for path in args.tokenizers or [path for path in TOKENIZERS if path.is_file()]:
        measure(path, text, args.repeats)


if __name__ == "__main__":
    main()
