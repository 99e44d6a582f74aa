"""What the commands share: how they are added to the parser, and types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int | None]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


def add_command(
    commands: argparse._SubParsersAction, name: str, what: str, run: Run
) -> argparse.ArgumentParser:
    """Add the command `name`, which `run` carries out; the first sentence of `what` is its line in --help."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what[0].lower() + what[1:].split(". ")[0].rstrip("."),
        description=what,
        formatter_class=Help,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number
