"""Small checkpoints to quantise."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import random_model, save_checkpoint

SIZES = {"hidden_size": 128, "intermediate_size": 192, "v_head_dim": 32, "qk_nope_head_dim": 32}
ESSAYS = Path(__file__).parents[2] / "examples" / "text" / "three-essays.txt"


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows or so: enough to see, quick to run."""
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(ESSAYS.read_text(encoding="utf-8")[:1800], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def dense_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deepseek_v2 without experts and q_lora, not tied."""
    model = random_model("deepseek_v2", moe=False, yarn=False, q_lora=False, **SIZES)
    return save_checkpoint(model, tmp_path_factory.mktemp("dense_v2"), None)


@pytest.fixture(scope="session")
def moe_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deepseek_v3 with experts and q_lora, tied embeddings."""
    model = random_model(
        "deepseek_v3", moe=True, yarn=True, q_lora=True, q_lora_rank=96, tie_word_embeddings=True,
        **SIZES,
    )  # fmt: skip
    return save_checkpoint(model, tmp_path_factory.mktemp("moe_v3"), None)


@pytest.fixture(scope="session")
def minicpm3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """minicpm3: rotary rows as halves, scaled branches."""
    model = random_model("minicpm3", moe=False, yarn=False, q_lora=True, q_lora_rank=96, **SIZES)
    return save_checkpoint(model, tmp_path_factory.mktemp("minicpm3"), None)
