"""``pq-fx demo``: see `pq_fx.demo.run`."""

from __future__ import annotations

import argparse
import os

from pq_fx.cli.common import add_command, positive


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    demo = add_command(
        commands,
        "demo",
        "Draw with the embedded model at full precision, 4 bits and 3 bits. Writes grid.png, "
        "layers.png and report.json; needs no network. Takes a few minutes on 2 CPU cores.",
        _demo,
    )
    demo.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    demo.add_argument("--images", type=positive, default=16, metavar="N", help="pictures a run")
    demo.add_argument("--steps", type=positive, default=12, metavar="N", help="steps a picture")
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
