"""`mla-deploy serve` as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import Result

Invoke = Callable[..., Result]
COMMAND = [sys.executable, "-c", "from mla_deploy.cli import main; main()", "serve"]


@contextmanager
def process(
    bundle: Path, *options: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, and what it printed when it began to listen."""
    begun = subprocess.Popen(
        [*COMMAND, str(bundle), "--port", "0", "--threads", "1", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert begun.stdout is not None
        lines = []
        while line := begun.stdout.readline():
            lines.append(line)
            if line == "}\n":
                break
        yield begun, json.loads("".join(lines))
    finally:
        begun.kill()
        begun.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_serves_until_it_is_told_to_end(bundle: Path, number: int, status: int) -> None:
    with process(bundle, "--max-tokens", "600", MLA_DEPLOY_API_KEY="k") as (begun, values):
        assert values["model"] == "tiny-int4"
        assert (values["max_tokens"], values["parallel"]) == (640, 8)
        client = openai.OpenAI(base_url=values["url"], api_key="k")
        made = client.completions.create(model="tiny-int4", prompt="My dear", max_tokens=3)
        assert made.usage is not None
        assert made.usage.completion_tokens == 3
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        stream = client.completions.create(
            model="tiny-int4", prompt="My dear", max_tokens=500, stream=True
        )
        next(iter(stream))
        begun.send_signal(number)
        output, messages = begun.communicate(timeout=60)
    assert (begun.returncode, output) == (status, "")
    assert "Traceback" not in messages
    assert "bug" not in messages


def test_a_public_address_without_a_key_is_warned_of(bundle: Path) -> None:
    with process(bundle, "--host", "0.0.0.0") as (begun, values):
        assert values["url"].startswith("http://0.0.0.0:")
        begun.send_signal(signal.SIGTERM)
        _, messages = begun.communicate(timeout=60)
    assert "warning: anyone who reaches 0.0.0.0" in messages


def test_it_serves_without_torch(bundle: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from mla_deploy.runtime import load\n"
        "from mla_deploy.runtime.serve.server import Server, ServerOptions, bind\n"
        f"Server(load({str(bundle)!r}, threads=1), bind('127.0.0.1', 0), ServerOptions())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "70000"),
        (["--parallel", "0"], "0"),
        (["--api-key", ""], "key is empty"),
        (["--host", "192.0.2.1"], "cannot listen"),
        (["--kernels", "magic", "--port", "0"], "auto, native, stock"),
        (["--device", "cuda", "--port", "0"], "--target cuda"),
    ],
)
def test_wrong_options_are_the_users_error(
    invoke: Invoke, bundle: Path, options: list[str], message: str
) -> None:
    result = invoke("serve", bundle, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_folder_that_is_no_bundle_is_the_users_error(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("serve", tmp_path, "--port", 0, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["kind"] == "BundleError"
