"""The errors a user meets.

Every error says what was wrong, what was found, what is allowed and what to do next. The command
line prints that text and exits with status 2; anything that is not an `MlaError` is our own bug and
exits with status 1.
"""

from __future__ import annotations


class MlaError(Exception):
    """Something the user can mend.

    Args:
        what: one sentence, what is wrong and where.
        found: the value met.
        allowed: what would have been accepted.
        hint: what to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        allowed: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.found = None if found is None else str(found)
        self.allowed = None if allowed is None else str(allowed)
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("found", self.found), ("allowed", self.allowed), ("next", self.hint)):
            if text is not None:
                lines.append(f"  {label + ':':<9}{text}")
        return "\n".join(lines)


class ConfigError(MlaError):
    """A config.json that cannot be read, or asks for something not supported."""


class CheckpointError(MlaError):
    """Weights that are missing, broken, or of the wrong shape or type."""


class TokenizerError(MlaError):
    """A tokenizer or chat template that is missing or unusable."""


class OutputError(MlaError):
    """An output that exists already, or cannot be written."""


class BundleError(MlaError):
    """A bundle whose manifest or files are not what they should be."""


class GraphError(BundleError):
    """A graph that this ONNX Runtime, with the operator library if any, cannot load."""


class SessionError(MlaError):
    """A request that a generation session cannot serve."""


class UsageError(MlaError):
    """Options that contradict each other or lie outside their range."""


class KernelsError(UsageError):
    """An operator library that ONNX Runtime cannot load."""
