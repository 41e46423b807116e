"""The example of a conversation, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream_chat.py"


def chat(bundle: Path, said: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), str(bundle), *options],
        input=said,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_a_second_turn_computes_only_what_is_new(own_toy: Toy) -> None:
    (own_toy.path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    own_toy.seal()
    done = chat(own_toy.path, "one\ntwo\n", "--max-tokens", "3", "--system", "Short.")
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.strip().splitlines()
    beginning = own_toy.load().tokenizer.encode("[system]Short.[user]one[assistant]")
    size = len(beginning) - 1  # without <bos>, which a template spells itself
    assert first.startswith("[3 tokens")
    assert f"; 0 of {size} prompt tokens" in first
    reused = int(second.split("; ")[1].split(" of ")[0])
    assert size <= reused <= size + 2


def test_a_bundle_that_is_none_is_an_error_of_the_user(tmp_path: Path, own_toy: Toy) -> None:
    done = chat(tmp_path / "nothing", "")
    assert done.returncode == 2
    assert "is not a bundle" in done.stderr
    done = chat(own_toy.path, "Hi\n")
    assert done.returncode == 2
    assert "no chat template" in done.stderr
