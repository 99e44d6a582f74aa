"""What the commands share: how they are added to the parser, and types of arguments."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pq_fx.integrations.pipelines import Sampling

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


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """--num-prompts, and the arguments of `sampling_of`."""
    group.add_argument(
        "--num-prompts", type=positive, metavar="N", help="use the first N of the prompts"
    )
    group.add_argument(
        "--steps", type=positive, metavar="N", help="steps a picture; default: the pipeline's"
    )
    for side in ("--height", "--width"):
        group.add_argument(side, type=positive, metavar="N", help="pixels; default: the pipeline's")
    group.add_argument(
        "--seed", type=int, default=0, help="of the first picture; the next has the next number"
    )
    group.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the pipeline, e.g. guidance_scale=3.5; may be given several times",
    )


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """How pictures are drawn. Raises ConfigError for a --call that is not NAME=VALUE."""
    from pq_fx.integrations.pipelines import Sampling, parse_arguments

    return Sampling(
        arguments.steps,
        arguments.height,
        arguments.width,
        arguments.seed,
        parse_arguments(arguments.call),
    )


def add_where(command: argparse.ArgumentParser) -> None:
    """Arguments of `dtype_of`, --device and --offload."""
    where = command.add_argument_group("where to compute")
    where.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")
    where.add_argument(
        "--offload",
        action="store_true",
        help="keep the pipeline on the CPU and move one model at a time to DEVICE, if that cannot hold them all",
    )
    where.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of everything that is not quantized; default: bfloat16 on a GPU, float32 on the CPU",
    )


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    """The dtype to compute in. Raises ConfigError for a --device that this machine does not have."""
    import torch

    from pq_fx.errors import ConfigError

    try:
        kind = torch.empty(0, device=arguments.device).device.type
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"--device {arguments.device!r} cannot be used: {first}") from error
    if arguments.dtype is not None:
        found: torch.dtype = getattr(torch, arguments.dtype)
        return found
    return torch.float32 if kind == "cpu" else torch.bfloat16


def printed(what: object) -> None:
    """Print a table or text on stdout: as wide as the terminal, or as it needs to be where that is none."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(what, highlight=False)


@contextmanager
def logged() -> Iterator[None]:
    """While open, what pq_fx logs of its progress is printed to stderr."""
    logger = logging.getLogger("pq_fx")
    handler, level = logging.StreamHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
