"""``pq-fx compare``: pictures of two pipelines from equal noise, and their distances."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pq_fx.cli.common import (
    add_command,
    add_sampling,
    add_where,
    dtype_of,
    sampling_of,
)

if TYPE_CHECKING:
    from rich.table import Table

    from pq_fx.comparison import Comparison


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "compare",
        "Draw with two pipelines from equal noise. Prints how far B's pictures are from A's (PSNR, structural "
        "distance) and writes them, side by side as well, with compare.json. Usually A is the float pipeline and B "
        "the quantized one.",
        _compare,
    )
    for name in "ab":
        command.add_argument(name, metavar=name.upper(), help="folder of a pipeline")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace the comparison in DIR")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    drawn = command.add_argument_group("pictures")
    drawn.add_argument("--prompts", metavar="FILE", help="a prompt a line, a picture each")
    drawn.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    add_sampling(drawn)
    add_where(command)


def _compare(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from rich.console import Console

    from pq_fx import comparison
    from pq_fx.integrations import pipelines

    folders = [pipelines.check_folder(folder) for folder in (arguments.a, arguments.b)]
    for folder in folders:
        pipelines.check_out(arguments.out, arguments.overwrite, folder, comparison.FILE)
    prompts = _prompts(arguments)
    dtype, sampling = dtype_of(arguments), sampling_of(arguments)
    console = Console(stderr=True)
    drawn = []
    for name, folder in zip("AB", folders, strict=True):
        console.print(f"{name}: loading {folder}", highlight=False)
        pipe = pipelines.load(folder, dtype, arguments.device, arguments.offload)
        sampling.of_call(pipe)
        pictures = []
        for number, prompt in enumerate(prompts):
            console.print(f"{name}: picture {number + 1} of {len(prompts)}", highlight=False)
            pictures.append(sampling.draw(pipe, prompt, number))
        drawn.append(pictures)
        del pipe  # both at once may not fit
    names = (folders[0].resolve().name, folders[1].resolve().name)
    with pipelines.new_folder(
        arguments.out, arguments.overwrite, folders[0], comparison.FILE
    ) as fresh:
        settings = sampling.to_dict() | {"device": arguments.device, "dtype": str(dtype)}
        made = comparison.compare(
            Path(fresh), names, prompts, sampling.seed, (drawn[0], drawn[1]), settings
        )
    if arguments.json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        Console().print(_table(made))
    console.print(f"pictures: {arguments.out}", highlight=False)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    from pq_fx.integrations import pipelines

    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        prompts += pipelines.read_prompts(arguments.prompts)
    return pipelines.first_prompts(prompts or pipelines.PROMPTS, arguments.num_prompts)


def _table(made: Comparison) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"{made.name_b} against {made.name_a}", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("prompt", overflow="fold")
    table.add_column("seed", justify="right")
    table.add_column("PSNR dB", justify="right")
    table.add_column("structural distance", justify="right")
    for pair in made.pairs:
        table.add_row(
            pair.prompt, str(pair.seed), f"{pair.psnr_db:.2f}", f"{pair.structural_distance:.4f}"
        )
    table.add_section()
    table.add_row("mean", "", f"{made.mean_psnr_db:.2f}", f"{made.mean_structural_distance:.4f}")
    return table
