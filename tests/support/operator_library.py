"""The operator library in tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_deploy.errors import UsageError
from mla_deploy.runtime import ops_library


def built_library() -> Path:
    """The library; without one the test that asks for it is skipped."""
    try:
        return ops_library()
    except UsageError as error:
        pytest.skip(f"{error.what}: {error.found}")
