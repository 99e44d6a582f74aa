"""``pq-fx report``: see `pq_fx.html_report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pq_fx.cli.common import add_command


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "report",
        "Write a page about a quantized model. One HTML file that needs no network: errors of every layer before and "
        "after, a table to sort and filter, what was left in float and why, and pictures.",
        _report,
    )
    command.add_argument(
        "model", metavar="DIR", help="folder of a quantized pipeline or model, from pq-fx quantize"
    )
    command.add_argument("--out", default="report.html", metavar="FILE", help="page to write")
    command.add_argument(
        "--images", metavar="DIR", help="show the pictures of pq-fx compare --out DIR"
    )
    command.add_argument(
        "--component", metavar="NAME", help="of a pipeline with several quantized ones"
    )


def _report(arguments: argparse.Namespace) -> None:
    from pq_fx.html_report import find_subject, page
    from pq_fx.storage import atomic_file

    subject = find_subject(arguments.model, arguments.component)
    text = page(subject, None if arguments.images is None else Path(arguments.images))
    with atomic_file(arguments.out) as fresh:
        fresh.write_text(text, encoding="utf-8")
    print(f"{arguments.out}: {len(subject.report.layers)} layers, {len(text) / 1e3:.0f} kB")
