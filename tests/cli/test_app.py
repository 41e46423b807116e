"""What all commands share: start-up, exit codes, what goes to which stream."""

from __future__ import annotations

import errno
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from mla_deploy.cli.app import COMMANDS
from mla_deploy.errors import ConfigError

Invoke = Callable[..., Result]
HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "numpy", "pydantic", "tokenizers", "rich"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mla_deploy.cli import main; main()"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def break_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `inspect` fail in a way that its code does not expect."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mla_deploy.inspection.inspect_model", fail)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom mla_deploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    arguments = [command, "--help"] if command else ["--help"]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    text, _, loaded = found.stdout.rpartition("LOADED")
    assert text.startswith("Usage: mla-deploy")
    assert HEAVY & set(loaded.split()) == set()


def test_help_lists_every_command_and_each_has_its_own(invoke: Invoke) -> None:
    listed = invoke("--help").stdout
    for name in COMMANDS:
        help_text = importlib.import_module(f"mla_deploy.cli.{name}").command.get_short_help_str(40)
        assert f"  {name} " in listed
        assert help_text.rstrip(".") in " ".join(listed.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_knows_json_and_debug(invoke: Invoke, name: str) -> None:
    text = invoke(name, "--help").stdout
    assert "--json" in text
    assert "--debug" in text


def test_an_unknown_command_is_the_users_error(invoke: Invoke) -> None:
    result = invoke("instpect")
    assert result.exit_code == 2
    assert "instpect" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["inspect", "--json"], ["inspect", "x", "--json", "--no-such-option"]]
)
def test_errors_in_the_options_are_json_too(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["kind"] == "UsageError"
    assert "mla-deploy inspect --help" in result.stderr


def test_a_users_error_says_all_on_standard_error_and_ends_with_2(tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "config.json does not exist" in result.stderr
    assert "next:" in result.stderr
    assert "Traceback" not in result.stderr


def test_with_json_an_error_is_one_object_on_standard_output(tmp_path: Path) -> None:
    result = run("inspect", tmp_path, "--json")
    assert result.returncode == 2
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "ConfigError"
    assert "config.json does not exist" in error["what"]
    assert error["next"]
    assert error["exit_code"] == 2
    assert "config.json does not exist" in result.stderr


def test_json_before_another_options_error_counts_wherever_it_stands(invoke: Invoke) -> None:
    result = invoke("inspect", "model", "--memory", "lots", "--json")
    assert result.exit_code == 2
    assert "lots" in json.loads(result.stdout)["error"]["what"]


def test_a_value_called_json_is_not_the_flag(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("run", tmp_path, "a prompt", "--stop", "--json")
    assert result.exit_code == 2
    assert result.stdout == ""


def test_a_bug_ends_with_1_and_says_that_it_is_ours(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_with(monkeypatch, ZeroDivisionError("by nothing"))
    result = invoke("inspect", "model", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "Bug"
    assert "bug in mla-deploy" in result.stderr
    assert "ZeroDivisionError: by nothing" in result.stderr
    assert "Traceback" not in result.stderr


def assert_traceback(result: Result) -> None:
    assert "Traceback" in result.stderr
    assert "break_with" in result.stderr or "fail" in result.stderr


def test_debug_shows_where(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError("by nothing"), ConfigError("wrong")):
        break_with(monkeypatch, error)
        assert_traceback(invoke("inspect", "model", "--debug"))
        assert_traceback(invoke("inspect", "model", env={"MLA_DEPLOY_DEBUG": "1"}))


def test_a_full_disk_is_no_bug(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    break_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/somewhere/file"))
    result = invoke("inspect", "model")
    assert result.exit_code == 2
    assert "No space left on device: /somewhere/file" in result.stderr


def test_another_system_error_is_one(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    break_with(monkeypatch, OSError(errno.EBADF, "Bad file descriptor"))
    assert invoke("inspect", "model").exit_code == 1


def test_control_c_ends_with_130(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    break_with(monkeypatch, KeyboardInterrupt())
    result = invoke("inspect", "model")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "stopped" in result.stderr


def test_a_reader_that_leaves_is_no_bug(tiny_mla: Path) -> None:
    command = [sys.executable, "-c", "from mla_deploy.cli import main; main()"]
    process = subprocess.Popen(
        [*command, "inspect", str(tiny_mla)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr is not None
    assert b"bug" not in process.stderr.read()


def test_the_version_is_the_packages(invoke: Invoke) -> None:
    from mla_deploy import __version__

    assert __version__ in invoke("--version").stdout
