"""How far a long piece of work is, for whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`: so much of the total is done, in whatever the work is counted in,
and `what` is being worked on. It may be slow, and is called seldom."""
