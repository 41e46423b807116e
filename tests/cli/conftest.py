"""The command as a user meets it, and models that went through it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mla_deploy.cli import main


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run `mla-deploy` with these arguments, in this process."""
    return _invoke


@pytest.fixture
def values_of() -> Callable[..., dict[str, Any]]:
    """Run it with --json; the object that it printed."""
    return _values_of


def _invoke(*arguments: object, **extra: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **extra)


def _values_of(*arguments: object, **extra: Any) -> dict[str, Any]:
    result = _invoke(*arguments, "--json", **extra)
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.fixture(scope="session")
def quantized(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-mla in int4, weights and cache."""
    out = tmp_path_factory.mktemp("quantized") / "tiny-int4"
    _values_of("quantize", tiny_mla, "-o", out)
    return out


@pytest.fixture(scope="session")
def bundle(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `quantized`."""
    out = tmp_path_factory.mktemp("bundle") / "tiny-int4"
    _values_of("export", quantized, "-o", out)
    return out


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred tokens."""
    essays = Path(__file__).parents[2] / "examples" / "text" / "three-essays.txt"
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(essays.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return file
