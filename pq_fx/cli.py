"""The command line: ``pq-fx COMMAND``. Each command is a function that takes its parsed arguments.

Exit codes: 0 done, 1 an error nobody foresaw, 2 an error that the user can mend (also argparse's
own), 130 interrupted. Errors are one paragraph on stderr; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from pq_fx.errors import PQError

FORESEEN = (PQError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        print("pq-fx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        print(_paragraph(error), file=sys.stderr)
        return 2 if isinstance(error, FORESEEN) else 1


def _paragraph(error: Exception) -> str:
    text = f"pq-fx: {error}"
    if not isinstance(error, FORESEEN):
        text = f"pq-fx: unexpected {type(error).__name__}: {error}; run with --debug for the trace"
    return textwrap.fill(" ".join(text.split()), width=100, break_long_words=False)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pq-fx",
        description="4-bit and 3-bit weights and activations for diffusion transformers.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _version() -> str:
    from importlib.metadata import version

    return f"pq-fx {version('pq-fx')}"


def _add(commands: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what[0].lower() + what[1:].split(". ")[0].rstrip("."),
        description=what,
        formatter_class=_Help,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = _add(
        commands,
        "demo",
        "Draw with the embedded model at full precision, 4 bits and 3 bits. Writes grid.png, "
        "layers.png and report.json; needs no network. Takes a few minutes on 2 CPU cores.",
    )
    demo.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    demo.add_argument("--images", type=_positive, default=16, metavar="N", help="pictures a run")
    demo.add_argument("--steps", type=_positive, default=12, metavar="N", help="steps a picture")
    demo.add_argument("--seed", type=int, default=0, help="of the noise and of calibration")
    demo.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")
    demo.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="draw this instead, may be given several times; texts beyond the packaged ones need "
        "pip install 'pq-fx[text]'",
    )
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from pq_fx.demo.run import run_demo

    run_demo(
        os.path.abspath(arguments.out),
        images=arguments.images,
        steps=arguments.steps,
        seed=arguments.seed,
        device=arguments.device,
        texts=arguments.prompt,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
