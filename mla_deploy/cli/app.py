"""The command group: finds the commands, and turns what went wrong into messages and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mla_deploy import __version__
from mla_deploy.cli.reporter import Reporter, errors_of_click
from mla_deploy.errors import MlaError

COMMANDS = (
    "inspect", "convert", "quantize", "export", "build", "run", "chat", "serve", "eval", "bench",
)  # fmt: skip
"""In the order of the work. Each is `mla_deploy.cli.NAME.command`."""

USERS_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
"""What only the user can mend: a full or closed disk."""

LEFT_OUT = {"torch": "torch", "onnx": "onnx", "onnx_ir": "onnx-ir", "safetensors": "safetensors"}
"""Modules, and their packages, that runtime/requirements.txt leaves out: bundles run without."""

EXIT_BUG = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141
"""As a shell shows a program that wrote to a pipe nobody reads any more."""


class CommandGroup(click.Group):
    """Imports a command when it is asked for, and reports every failure in one form."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mla_deploy.cli.{name}").command
        return command

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        reporter = Reporter(debug=bool(os.environ.get("MLA_DEPLOY_DEBUG")))
        extra.update(standalone_mode=False, obj=reporter)
        try:
            status = super().main(arguments, "mla-deploy", **extra)
        except SystemExit:  # click's answer to a closed pipe, with the status of a bug
            sys.exit(EXIT_CLOSED_PIPE)
        except click.UsageError as error:
            # The options were not read, or not all of them.
            reporter.json = reporter.json or "--json" in arguments
            reporter.failure(errors_of_click(error), EXIT_USER)
            sys.exit(EXIT_USER)
        except click.ClickException as error:
            reporter.failure(errors_of_click(error), EXIT_USER)
            sys.exit(EXIT_USER)
        except click.Abort:
            reporter.note("stopped")
            sys.exit(EXIT_INTERRUPTED)
        except MlaError as error:
            _show_traceback(reporter)
            reporter.failure(error, EXIT_USER)
            sys.exit(EXIT_USER)
        except OSError as error:
            if error.errno not in USERS_ERRNOS:
                self._report_bug(reporter, error)
            _show_traceback(reporter)
            where = f": {error.filename}" if error.filename else ""
            what = f"{error.strerror}{where}"
            reporter.failure(MlaError(what, hint="make room, or write elsewhere"), EXIT_USER)
            sys.exit(EXIT_USER)
        except ModuleNotFoundError as error:
            if error.name not in LEFT_OUT:
                self._report_bug(reporter, error)
            _show_traceback(reporter)
            what = f"this command needs {error.name}, which is not installed"
            hint = "pip install " + " ".join(LEFT_OUT.values())
            reporter.failure(MlaError(what, hint=hint), EXIT_USER)
            sys.exit(EXIT_USER)
        except Exception as error:
            self._report_bug(reporter, error)
        sys.exit(status if isinstance(status, int) else 0)

    def _report_bug(self, reporter: Reporter, error: Exception) -> NoReturn:
        _show_traceback(reporter)
        bug = MlaError(
            "this is a bug in mla-deploy, not something you did wrong",
            found=f"{type(error).__name__}: {error}",
            hint="please report it with the output of the same command and --debug",
        )
        reporter.failure(bug, EXIT_BUG, kind="Bug")
        sys.exit(EXIT_BUG)


def _show_traceback(reporter: Reporter) -> None:
    if reporter.debug:
        traceback.print_exc()


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="mla-deploy")
def main() -> None:
    """Make models with multi-head latent attention small, and run them.

    \b
    The usual way of a model:
      mla-deploy build MODEL -o BUNDLE
      mla-deploy run BUNDLE "Once upon a time"

    \b
    Step by step (convert: if its attention is not latent yet):
      mla-deploy convert SOURCE -o MODEL --target-ratio 0.25 --calibration TEXT
      mla-deploy quantize MODEL -o SMALL --kv int4 --weights int4
      mla-deploy export SMALL -o BUNDLE --to onnx
    """
