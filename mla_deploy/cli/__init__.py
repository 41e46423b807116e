"""The `mla-deploy` command: click commands, one file each, and no logic.

Commands may import every other part of mla-deploy; no other part imports them. They import the
heavy parts inside their bodies, so that `mla-deploy --help` loads neither torch nor onnx.

What all commands share (`app`, `reporter`):

- exit codes: 0 done, 2 something the user can mend, 1 a bug of ours, 130 stopped with Ctrl-C, 141
  the reader of standard output left;
- `--json`: standard output holds exactly one JSON object, the result or, after a failure,
  `{"error": {"kind", "what", "found", "allowed", "next", "exit_code"}}`; messages and progress go
  to standard error with and without it;
- `--debug`, or MLA_DEPLOY_DEBUG=1: a traceback with every error.
"""

from mla_deploy.cli.app import main

__all__ = ["main"]
