"""A conversation with a bundle, in the terminal.

    python examples/stream_chat.py BUNDLE [--temperature 0.7] [--system "Be brief."]

Text appears as it is made. Every turn sends the whole conversation, but the session remembers what
it has computed: only what is new goes through the model. An empty line, or Ctrl-D, ends it.
`mla-deploy chat` is the same with commands, and with Ctrl-C to stop an answer.
"""

from __future__ import annotations

import argparse
import sys

from mla_deploy.errors import MlaError
from mla_deploy.runtime import Conversation, GenerationOptions, load


def main() -> int:
    parser = argparse.ArgumentParser(description="A conversation with a bundle.")
    parser.add_argument("bundle")
    parser.add_argument("--system", help="what the model is told first")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    arguments = parser.parse_args()
    try:
        options = GenerationOptions(
            max_tokens=arguments.max_tokens, temperature=arguments.temperature
        )
        engine = load(arguments.bundle)
        with Conversation(engine, options, system=arguments.system) as conversation:
            converse(conversation)
    except MlaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def converse(conversation: Conversation) -> None:
    """Turn after turn, until the user has nothing to say."""
    while said := ask():
        with conversation.send(said) as answer:
            for event in answer:
                print(event.text, end="", flush=True)
        took = answer.result.statistics
        speed = took.decode_tokens_per_s
        print()
        print(
            f"[{took.generated_tokens} tokens"
            + (f", {speed:.1f} tokens/s" if speed else "")
            + f"; {took.reused_tokens} of {took.prompt_tokens} prompt tokens from the cache,"
            f" {took.cache_bytes / 1024:.0f} KiB]",
            file=sys.stderr,
        )


def ask() -> str:
    """The user's next turn; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
