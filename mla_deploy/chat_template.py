"""Chat templates: other people's Jinja, run in a sandbox.

With what Hugging Face's templates expect: `raise_exception`, `strftime_now`, a `tojson` that does
not escape HTML, `break` and `continue`, and `{% generation %}` blocks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mla_deploy.errors import TokenizerError


def render_template(template: str, variables: Mapping[str, Any], origin: Path) -> str:
    """Render a chat template.

    Args:
        variables: plain JSON values.
        origin: where the template comes from, for messages.

    Raises:
        TokenizerError: it is broken, refuses the conversation, or reaches outside the sandbox.
    """
    what = f"the chat template of {origin}"
    try:
        return _compiled(template).render(**variables)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(
            f"{what} is broken",
            found=f"line {error.lineno}: {error.message}",
            hint="get the file again, or mend the template",
        ) from None
    except SecurityError as error:
        raise TokenizerError(
            f"{what} does something that its sandbox forbids",
            found=error,
            hint="look where the model comes from, or put another template in its place",
        ) from None
    except _RefusalError as error:
        raise TokenizerError(
            f"{what} does not accept this conversation",
            found=error.message,
            hint="look at the order of the roles",
        ) from None
    except Exception as error:  # a template can fail in any way Python can
        raise TokenizerError(
            f"{what} cannot render this conversation",
            found=f"{type(error).__name__}: {error}",
            hint="look at the roles and fields that the template reads",
        ) from None


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _RefusalError(jinja2.TemplateError):
    """Raised by a template that does not accept the conversation."""


def _raise_exception(message: str) -> NoReturn:
    raise _RefusalError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which would change the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)
