"""`mla-deploy chat`, in a script and at a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mla_deploy.bundle import Bundle, describe_file, write_manifest
from mla_deploy.cli.interrupts import ControlC
from mla_deploy.runtime import load

Invoke = Callable[..., Result]
ValuesOf = Callable[..., dict[str, Any]]

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
SHORT = ("-n", 4, "--threads", 1)


@pytest.fixture(scope="module")
def talker(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "bundle"
    shutil.copytree(bundle, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    manifest = Bundle.open(folder).manifest
    files = [*manifest.files, describe_file(folder, "chat_template.jinja")]
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    return folder


@pytest.fixture
def chat(talker: Path, values_of: ValuesOf) -> Callable[..., dict[str, Any]]:
    """What comes of these lines, with --json."""
    return lambda said, *options: values_of("chat", talker, *SHORT, *options, input=said)


Chat = Callable[..., dict[str, Any]]


def said(values: dict[str, Any], role: str = "user") -> list[str]:
    return [one["content"] for one in values["messages"] if one["role"] == role]


def test_each_line_is_a_turn_and_standard_output_holds_the_answers(
    talker: Path, chat: Chat, invoke: Invoke
) -> None:
    values = chat("one\n\ntwo\n")
    assert said(values) == ["one", "two"]
    answers = said(values, "assistant")
    assert [answer["text"] for answer in values["answers"]] == answers
    plain = invoke("chat", talker, *SHORT, input="one\n\ntwo\n")
    assert plain.exit_code == 0, plain.output
    assert plain.stdout == "".join(f"{answer}\n" for answer in answers)
    assert "> " not in plain.output


def test_the_second_turn_computes_only_what_is_new(chat: Chat, talker: Path) -> None:
    values = chat("one\ntwo\n", "--system", "Short.")
    assert said(values, "system") == ["Short."]
    first, second = values["answers"]
    tokenizer = load(talker).tokenizer
    start = tokenizer.encode("[system]Short.[user]one[assistant]", add_special_tokens=False)
    assert (first["prompt_tokens"], first["reused_tokens"]) == (len(start), 0)
    assert second["reused_tokens"] >= len(start)


def test_sampling_options_are_those_of_run(chat: Chat) -> None:
    def answers(*options: object) -> list[str]:
        return said(chat("one\n", *options), "assistant")

    drawn = answers("--temperature", 1.5, "--seed", 1)
    assert drawn != answers()
    assert drawn == answers("--temperature", 1.5, "--seed", 1)
    assert answers("--temperature", 1.5, "--seed", 1, "--top-k", 1) == answers()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("one\\\ntwo\n", ["one\ntwo"]),
        ("one\\\n", ["one"]),
        ('"""one\n\ntwo"""\nthree\n', ["one\n\ntwo", "three"]),
        ('"""\none\n/exit\n"""\n', ["one\n/exit"]),
        ('"""/etc is a folder"""\n', ["/etc is a folder"]),
        ('"""one\ntwo', ["one\ntwo"]),
        ("  one  \r\n", ["one"]),
        ("caf\u00e9", ["caf\u00e9"]),
    ],
)
def test_a_turn_may_have_several_lines(lines: str, expected: list[str], chat: Chat) -> None:
    assert said(chat(lines.encode())) == expected


def test_exit_ends_before_the_input_does(chat: Chat) -> None:
    assert said(chat("one\n/exit\ntwo\n")) == ["one"]
    assert chat("")["messages"] == []


def test_undo_and_clear_forget(chat: Chat) -> None:
    assert said(chat("one\ntwo\n/undo\n/undo\n/undo\nthree\n")) == ["three"]
    values = chat("one\ntwo\n/clear\nthree\n", "--system", "Short.")
    assert (said(values), said(values, "system")) == (["three"], ["Short."])


def test_a_conversation_is_saved_and_loaded(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "a talk.json"
    whole = chat(f"one\ntwo\n/save {file}\nthree\n")
    assert sorted(os.listdir(tmp_path)) == ["a talk.json", "a talk.json.session"]
    resumed = chat(f"other\n/load {file}\nthree\n")
    assert resumed["messages"] == whole["messages"]
    assert resumed["answers"][-1]["reused_tokens"] == whole["answers"][-1]["reused_tokens"] > 0


def test_stats_and_help_come_on_standard_error(talker: Path, invoke: Invoke) -> None:
    result = invoke("chat", talker, *SHORT, input="/stats\none\n/stats\n/help\n")
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.stderr
    assert "of 4,096 tokens" in result.stderr
    for name in ("/undo", "/clear", "/save", "/load", "/stats", "/exit", "Ctrl-C"):
        assert name in result.stderr
    assert "/undo" not in result.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "no such command"),
        ("/save", "needs a file"),
        ("/undo 2", "stands alone"),
        ("/load no-such-file", "no-such-file cannot be read"),
        ("/save no/such/folder/talk", "cannot be written"),
        ("x" * 9000, "does not fit into the context"),
    ],
)
def test_in_a_script_the_first_error_ends_it(
    line: str, message: str, talker: Path, invoke: Invoke
) -> None:
    result = invoke("chat", talker, *SHORT, input=f"one\n{line}\ntwo\n")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "found:" in result.stderr
    assert result.stdout == invoke("chat", talker, *SHORT, input="one\n").stdout


def test_a_line_that_is_not_utf8_is_refused(talker: Path, invoke: Invoke) -> None:
    result = invoke("chat", talker, *SHORT, input=b"caf\xe9\n")
    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr


def test_a_context_that_is_nearly_full_is_said(talker: Path, invoke: Invoke) -> None:
    long = "x y " * 1850
    result = invoke("chat", talker, *SHORT, input=f"one\n{long}\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("the context is nearly full") == 1
    assert "4,096" in result.stderr
    assert "/undo forgets" in result.stderr
    cut = invoke("chat", talker, "-n", 1000, "--threads", 1, input=f"{long}\n")
    assert cut.exit_code == 0, cut.output
    assert "the context is full: the answer was cut off" in cut.stderr


def test_an_answer_that_is_cut_off_by_its_length_is_said(talker: Path, invoke: Invoke) -> None:
    result = invoke("chat", talker, *SHORT, input="one\n")
    assert "[cut off after 4 tokens: --max-tokens]" in result.stderr


def test_a_bundle_without_a_template_is_for_run(bundle: Path, invoke: Invoke) -> None:
    result = invoke("chat", bundle, input="one\n")
    assert result.exit_code == 2
    assert "mla-deploy run" in result.stderr


def test_chat_needs_no_torch(talker: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom mla_deploy.cli import main\n"
        f"main(['chat', {str(talker)!r}, '-n', '1'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], input="one\n", capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


AT_A_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes as a signal
from mla_deploy.cli import main
main()
"""


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self._fd, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._seen = 0
        self.shown = ""

    def type(self, text: str) -> None:
        """At the prompt, or the terminal may not be set to give Ctrl-D on yet."""
        os.write(self._fd, text.encode())

    def leave_line(self, shown: str) -> None:
        """Press Ctrl-C while a line is typed. One that comes just before readline waits for the
        next key is seen with the next one."""
        for _ in range(60):
            self.type("\x03")
            if self._comes(shown, seconds=2):
                return
        raise AssertionError(self.shown)

    def wait_for(self, text: str) -> None:
        """Read until that is shown, after what was waited for before."""
        assert self._comes(text, seconds=120), self.shown

    def _comes(self, text: str, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (found := self.shown.find(text, self._seen)) < 0:
            if time.monotonic() > until:
                return False
            if select.select([self._fd], [], [], 0.1)[0]:
                self.shown += os.read(self._fd, 1 << 16).decode(errors="replace")
        self._seen = found + len(text)
        return True

    def finish(self) -> int:
        """The exit status."""
        try:
            status = self._process.wait(timeout=120)
            with contextlib.suppress(OSError):  # as Linux says that the other side is closed
                while select.select([self._fd], [], [], 0)[0]:
                    self.shown += os.read(self._fd, 1 << 16).decode(errors="replace")
            return status
        finally:
            self._process.kill()
            os.close(self._fd)


def test_control_c_stops_the_answer_and_not_the_program(talker: Path) -> None:
    terminal = Terminal("chat", talker, "-n", 4000, "--threads", 1)
    terminal.wait_for("> ")
    terminal.type("one\n")
    terminal.wait_for("one\r\n")
    terminal.wait_for(" ")  # a word of the answer
    terminal.type("\x03")
    terminal.wait_for("[stopped")
    terminal.wait_for("> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.leave_line("\n(Ctrl-D or /exit ends)")
    terminal.wait_for("> ")
    terminal.type("/nothing\n")
    terminal.wait_for("no such command")
    terminal.wait_for("> ")
    terminal.type("/stats\n")
    terminal.wait_for("turns")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.finish() == 0
    assert "Traceback" not in terminal.shown


def test_control_c_does_what_is_said_and_otherwise_nothing() -> None:
    pressed = []
    with ControlC() as control_c:
        os.kill(os.getpid(), signal.SIGINT)
        with control_c.does(lambda: pressed.append("here")):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert pressed == ["here"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_control_c_ends_a_script(talker: Path) -> None:
    code = "from mla_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "chat", str(talker), "-n", "4000", "--threads", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        assert process.wait(timeout=120) == 130


def test_with_json_there_is_one_object_as_a_process(talker: Path) -> None:
    code = "from mla_deploy.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "chat", str(talker), "-n", "2", "--json"],
        input="one\n/stats\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert len(json.loads(found.stdout)["answers"]) == 1
