"""`mla-deploy chat`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.interrupts import ControlC
from mla_deploy.cli.loading import load_engine
from mla_deploy.cli.options import PATH, engine_options, generation_options
from mla_deploy.cli.reporter import Reporter, reporting
from mla_deploy.cli.turns import is_interactive, read_turns
from mla_deploy.errors import MlaError, SessionError, UsageError

if TYPE_CHECKING:
    from mla_deploy.runtime import Conversation, GenerationResult

HELP = """\
/help        this
/clear       start anew; what --system says stays
/undo        forget the last turn
/save FILE   write the conversation; FILE.session beside it is its cache
/load FILE   go on with such a conversation
/stats       tokens, bytes and speed
/exit        end; so does Ctrl-D
Ctrl-C stops an answer.
Text of several lines: a \\ at the end of a line, or \"\"\" before and after it; a text in
\"\"\" may begin with a slash."""


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--system", metavar="TEXT", help="What the model is told before the first turn.")
@generation_options(max_tokens=1024)
@engine_options
@reporting
def command(
    reporter: Reporter,
    /,
    bundle: Path,
    system: str | None,
    threads: int | None,
    kernels: str | None,
    device: str | None,
    **generation_choices: Any,
) -> None:
    """Talk with the model in BUNDLE, which must have a chat template.

    /help shows what else can be said. Where standard input is not a terminal, each of its lines is
    a turn, and the first error ends the conversation.
    """
    from mla_deploy.runtime import Conversation, GenerationOptions

    options = GenerationOptions(**generation_choices)
    engine = load_engine(reporter, bundle, threads=threads, kernels=kernels, device=device)
    with Conversation(engine, options, system=system) as conversation:
        chat = Chat(reporter, conversation)
        if is_interactive() and not reporter.json:
            with ControlC() as control_c:
                chat.run(control_c)
        else:
            chat.run()
        if reporter.json:
            values = {
                "bundle": str(bundle),
                "messages": conversation.messages,
                "answers": chat.answers,
                "tokens": conversation.tokens,
                "room": conversation.room,
                "kv_bytes_per_token": engine.kv_bytes_per_token,
                "kernels": engine.kernels.name,
            }
            reporter.result(values, "")


class Chat:
    """The conversation at a terminal, or in a script."""

    def __init__(self, reporter: Reporter, conversation: Conversation) -> None:
        self.answers: list[dict[str, Any]] = []
        """Figures of each, for `--json`."""
        self._reporter = reporter
        self._conversation = conversation
        self._control_c: ControlC | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: reporter.note(HELP),
            "/clear": self._clear,
            "/undo": self._undo,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
        }

    def run(self, control_c: ControlC | None = None) -> None:
        """Turn after turn, to the end of the input or `/exit`.

        Args:
            control_c: of the terminal, where somebody sits at one.

        Raises:
            MlaError: a turn or a command failed, and nobody is there to mend it.
        """
        self._control_c = control_c
        if control_c is not None:
            self._reporter.note("/help shows the commands; Ctrl-D or /exit ends")
        for turn in read_turns(control_c):
            if turn.command == "/exit":
                return
            try:
                if turn.command is None:
                    self._answer(turn.text)
                else:
                    self._command(turn.command, turn.text)
            except MlaError as error:
                if control_c is None:
                    raise
                self._reporter.note(str(error))

    def _answer(self, text: str) -> None:
        from mla_deploy.runtime import Cancellation

        cancellation = Cancellation()
        with (
            nullcontext()
            if self._control_c is None
            else self._control_c.does(cancellation.request),
            self._conversation.send(text, cancellation=cancellation) as answer,
        ):
            for event in answer:
                if not self._reporter.json:
                    click.echo(event.text, nl=False)
        if not self._reporter.json:
            click.echo()
        self.answers.append(_figures(answer.result))
        self._say_what_was_cut_off(answer.result, is_stopped=cancellation.requested)

    def _say_what_was_cut_off(self, result: GenerationResult, *, is_stopped: bool) -> None:
        conversation = self._conversation
        if is_stopped:
            self._reporter.note("[stopped]" if result.text else "[stopped; the turn is forgotten]")
        elif result.finish_reason == "length":
            self._reporter.note(f"[cut off after {len(result.tokens):,} tokens: --max-tokens]")
        if result.finish_reason == "context" or conversation.is_nearly_full:
            is_full = result.finish_reason == "context"
            full = SessionError(
                f"the context is {'full: the answer was cut off' if is_full else 'nearly full'}",
                found=f"{conversation.tokens:,} tokens",
                allowed=f"{conversation.tokens + conversation.room:,}",
                hint="/undo forgets the last turn, /clear all of them",
            )
            self._reporter.note(str(full))

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise UsageError(
                "there is no such command",
                found=name,
                allowed=", ".join((*self._commands, "/exit")),
                hint='put a text that begins with a slash in """',
            )
        needs_file = name in ("/save", "/load")
        if needs_file != bool(argument):
            raise UsageError(
                f"{name} needs a file" if needs_file else f"{name} stands alone",
                found=argument or "none",
                allowed=f"{name} FILE" if needs_file else name,
            )
        self._commands[name](argument)

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._reporter.note("[all forgotten]")

    def _undo(self, _: str) -> None:
        is_undone = self._conversation.undo()
        self._reporter.note("[the last turn is forgotten]" if is_undone else "[nothing to forget]")

    def _save(self, argument: str) -> None:
        self._conversation.save(Path(argument))
        self._reporter.note(f"[saved: {argument}, and its cache beside it]")

    def _load(self, argument: str) -> None:
        is_cached = self._conversation.load(Path(argument))
        cache = "" if is_cached else "; without its cache: the next turn computes all of it"
        turns = self._conversation.turns
        self._reporter.note(f"[{turns} turn{'s' * (turns != 1)}{cache}]")

    def _stats(self, _: str) -> None:
        conversation = self._conversation
        total = conversation.tokens + conversation.room
        entries = [
            ("turns", str(conversation.turns)),
            ("context", f"{conversation.tokens:,} of {total:,} tokens"),
            ("cache", table.size(conversation.cache_bytes)),
        ]
        if (result := conversation.result) is not None:
            took = result.statistics
            entries += [
                ("prompt", f"{took.prompt_tokens:,} tokens, {took.reused_tokens:,} from the cache"),
                ("computed", _rate(took.prefill_tokens_per_s)),
                ("answer", f"{took.generated_tokens:,} tokens"),
                ("made", _rate(took.decode_tokens_per_s)),
            ]
        self._reporter.note(table.pairs(entries))


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def _figures(result: GenerationResult) -> dict[str, Any]:
    took = result.statistics
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": took.prompt_tokens,
        "reused_tokens": took.reused_tokens,
        "generated_tokens": took.generated_tokens,
        "prefill_tokens_per_s": took.prefill_tokens_per_s,
        "decode_tokens_per_s": took.decode_tokens_per_s,
        "cache_bytes": took.cache_bytes,
    }
