"""What a person sees while a model is calibrated: a live line on a terminal, a log line a call elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pq_fx.statistics import Statistics

log = logging.getLogger("pq_fx")


class CalibrationProgress:
    """Calls done, time left where the number of calls is known, and what was gathered so far.

    Args:
        statistics: what is being gathered.
        total: calls in all, those of an earlier run among them; None when unknown.
        console: where to draw; by default standard error. Nothing is drawn where it is no terminal.
        show: False draws and logs nothing, True draws even where the console is no terminal.
    """

    def __init__(
        self,
        statistics: Statistics,
        total: int | None = None,
        console: Console | None = None,
        show: bool | None = None,
    ) -> None:
        self.statistics = statistics
        self.total = total
        console = console or Console(stderr=True)
        self._draws = console.is_terminal if show is None else show
        self._logs = show is None and not self._draws
        self._bar = Progress(
            TextColumn("calibrating"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("calls"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not self._draws,
        )
        self._task = self._bar.add_task("tracing the model", total=total, start=False)
        self._started = self._last = time.perf_counter()
        self._rest = 0  # calls after the first of this run, and the seconds that they took
        self._rest_seconds = 0.0
        self._first = True
        self._warned: set[str] = set()

    def __enter__(self) -> CalibrationProgress:
        self._bar.start()
        self._bar.start_task(self._task)
        self._bar.update(self._task, completed=self.statistics.calls)
        self._started = self._last = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def called(self) -> None:
        """A call was completed."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not self._first:  # the first call traces the model and says nothing about the others
            self._rest += 1
            self._rest_seconds += seconds
        self._first = False
        done = self.statistics.calls
        self._bar.update(self._task, completed=done, total=self.total, description=self.summary())
        if self._logs:
            of = "" if self.total is None else f" of {self.total}"
            left = self.left()
            ahead = "" if left is None else f", about {duration(left)} left"
            log.info("calibration call %d%s: %s%s", done, of, duration(seconds), ahead)
        self._warn_of_nan()

    def left(self) -> float | None:
        """Seconds that the calls ahead will take; None when it is not known yet."""
        if self.total is None or not self._rest:
            return None
        return max(0, self.total - self.statistics.calls) * self._rest_seconds / self._rest

    def summary(self) -> str:
        """What was gathered, in a few words."""
        found = self.statistics
        rows = max((int(m.count) for m in found.moments.values()), default=0)
        return f"{len(found.plan.linears)} linears in {len(found.plan.regions)} regions, up to {rows:,} rows each"

    def _warn_of_nan(self) -> None:
        """Say at once what would otherwise be an error at the very end."""
        moments = self.statistics.moments
        if not moments:
            return
        largest = torch.stack([m.amax.max().cpu() for m in moments.values()])
        bad = [n for n, ok in zip(moments, largest.isfinite().tolist(), strict=True) if not ok]
        if fresh := [name for name in bad if name not in self._warned]:
            self._warned.update(fresh)
            log.warning(
                "calibration call %d: NaN or infinity at %s%s; converting will fail. fp16 overflow? Try bf16",
                self.statistics.calls,
                ", ".join(fresh[:3]),
                f" and {len(fresh) - 3} more" if len(fresh) > 3 else "",
            )


def duration(seconds: float) -> str:
    """Seconds for people: "0.4 s", "41 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
