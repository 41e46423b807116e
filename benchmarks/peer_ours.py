"""A bundle behind `peer_worker.py`.

python benchmarks/peer_ours.py BUNDLE THREADS MAX_TOKENS
"""

from __future__ import annotations

import sys

from peer_worker import Engine, serve

from mla_deploy.runtime import load


class Ours(Engine):
    """A session of a bundle."""

    def __init__(self, bundle: str, threads: int, max_tokens: int) -> None:
        engine = load(bundle, threads=threads, max_tokens=max_tokens, kernels="native")
        self.vocab_size = engine.bundle.manifest.model.vocab_size
        self.bytes_per_token = engine.kv_bytes_per_token
        self._session = engine.session()
        self.append = self._session.prefill  # type: ignore[assignment, method-assign]

    def append(self, tokens: list[int]) -> list[float]:
        raise NotImplementedError  # bound to the session's own

    def rewind(self, length: int) -> None:
        self._session.rewind(length)

    def fill(self, length: int) -> None:
        self._session.fill_by_copies(length)


if __name__ == "__main__":
    bundle, threads, max_tokens = sys.argv[1:]
    serve(lambda: Ours(bundle, int(threads), int(max_tokens)))
