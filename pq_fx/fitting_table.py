"""A table for terminals of any width: where not all columns fit, the least important ones are left out by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A column's heading, its cells, and how it behaves.

    `rank` 0 is always shown; of the others the highest rank goes first where the table is too wide. A column that
    folds is broken over lines, and only when nothing is left to leave out.
    """

    name: str
    cells: Sequence[str]
    rank: int = 0
    right: bool = False
    folds: bool = False


@dataclass(frozen=True)
class FittingTable:
    """A titled table of equally long columns, printed by rich."""

    title: str
    columns: Sequence[Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, left_out = list(self.columns), []
        while (
            any(c.rank for c in shown) and self._width(console, options, shown) > options.max_width
        ):
            least = max(shown, key=lambda c: c.rank)
            shown.remove(least)
            left_out.append(least.name)
        yield self._table(shown)
        if left_out:
            yield Text(f"left out at this width: {', '.join(reversed(left_out))}\n")

    def _width(self, console: Console, options: ConsoleOptions, shown: Sequence[Column]) -> int:
        unlimited = options.update(max_width=10_000)
        return Measurement.get(console, unlimited, self._table(shown)).maximum

    def _table(self, shown: Sequence[Column]) -> Table:
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD)
        for column in shown:
            table.add_column(
                column.name,
                justify="right" if column.right else "left",
                no_wrap=not column.folds,
                overflow="fold",
            )
        for row in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*row)
        return table
