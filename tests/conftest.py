"""Fixtures that every room shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and with it the programs that
    tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_mla() -> Path:
    """The trained model that ships with the project."""
    return ROOT / "examples" / "models" / "tiny-mla"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data that is not part of the project: `shared` beside the checkout, or MLA_DEPLOY_SHARED."""
    folder = Path(os.environ.get("MLA_DEPLOY_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"the shared data is not at {folder} (set MLA_DEPLOY_SHARED)")
    return folder


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """A seed of its own for every test, printed when the test fails."""
    seed = int(os.environ.get("MLA_DEPLOY_SEED", hash(request.node.nodeid) & 0xFFFF))
    print(f"MLA_DEPLOY_SEED={seed}")
    torch.manual_seed(seed)
