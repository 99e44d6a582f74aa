"""The command line: ``pq-fx COMMAND``. Each command is a module here with a `register` function.

Exit codes: 0 done, 1 an error nobody foresaw, 2 an error that the user can mend (also argparse's
own), 130 interrupted. Errors are one paragraph on stderr; ``--debug`` shows the traceback.
A command is ``run(arguments) -> int | None``; the number is its exit code, None means 0.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import traceback
from collections.abc import Sequence

from pq_fx.cli import compare, demo, inspect, quantize, report
from pq_fx.errors import PQError

FORESEEN = (PQError, OSError)
COMMANDS = (demo, inspect, quantize, compare, report)  # in the order of --help, and of use


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("pq-fx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            print(_paragraph(error), file=sys.stderr)
        return 2 if isinstance(error, FORESEEN) else 1


def _paragraph(error: Exception) -> str:
    text = f"pq-fx: {error}"
    if not isinstance(error, FORESEEN):
        text = f"pq-fx: unexpected {type(error).__name__}: {error}; run with --debug for the trace"
    return textwrap.fill(" ".join(text.split()), width=100, break_long_words=False)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    made = argparse.ArgumentParser(
        prog="pq-fx",
        description="4-bit and 3-bit weights and activations for diffusion transformers.",
        epilog="pq-fx COMMAND --help says more about each. Exit codes: 0 done, 2 an error that you can mend, 1 any "
        "other, 130 interrupted.",
    )
    made.add_argument("--version", action="version", version=_version())
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(commands)
    return made


def _version() -> str:
    from importlib.metadata import version

    return f"pq-fx {version('pq-fx')}"
