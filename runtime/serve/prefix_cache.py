"""Sequences that ended, kept as beginnings of later ones."""

from __future__ import annotations

from collections.abc import Sequence

from mla_deploy.runtime.native import token_array
from mla_deploy.runtime.session import Session

MOST = 256
"""Kept sessions. A prompt is compared with each, which takes about a microsecond."""


class PrefixCache:
    """Sessions, the one used longest ago first out. One thread at a time.

    What is found comes as a fork: it shares the pages, and takes memory of its own only as it goes
    on. So evicting a session frees the pages that no fork shares.
    """

    def __init__(self) -> None:
        self._kept: list[Session] = []  # last the one used last

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, session: Session) -> None:
        """Take a session that ended, in place of those that it goes on from."""
        tokens = token_array(session.tokens)
        same = [(one, one.common_prefix(tokens)) for one in self._kept]
        if any(length == len(tokens) < one.length for one, length in same) or not len(tokens):
            session.close()  # another goes on from it
            return
        for older in [one for one, length in same if length == one.length]:
            self._kept.remove(older)
            older.close()
        self._kept.append(session)
        while len(self._kept) > MOST:
            self.evict()

    def start(self, ids: Sequence[int]) -> Session | None:
        """A session that holds as much of the start of `ids` as any here; None: none holds any."""
        wanted = token_array(ids)
        best, most = None, 0
        for session in reversed(self._kept):
            same = session.common_prefix(wanted)
            if same > most:
                best, most = session, same
        if best is None:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        fork = best.fork()
        fork.rewind(most)
        return fork

    def evict(self) -> bool:
        """Close the session used longest ago; whether there was one."""
        if not self._kept:
            return False
        self._kept.pop(0).close()
        return True

    def clear(self) -> None:
        """Close all."""
        while self.evict():
            pass
