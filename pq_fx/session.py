"""One stretch of calibration: every call of the model is watched, and counts whole or not at all."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pq_fx.calibrate import Observer
from pq_fx.errors import CalibrationError
from pq_fx.passes import observe
from pq_fx.passes._torch import every_graph
from pq_fx.progress import CalibrationProgress
from pq_fx.seen import given_to, tensors
from pq_fx.statistics import ModelId, Statistics
from pq_fx.statistics_file import save_statistics

log = logging.getLogger("pq_fx")
Compiled = Callable[..., Any]


class Session:
    """Stands in for the model's compiled call while `Quantizer.calibrate` is open.

    Args:
        model: the float model.
        statistics: where calls are added.
        observer: makes a Dynamo backend that adds to them.
        seed: of the samples.
        progress: is told of each call.
        skip: this many calls are run but not counted: an earlier run counted them already.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Statistics,
        observer: Callable[[], Observer],
        seed: int,
        progress: CalibrationProgress,
        skip: int = 0,
    ) -> None:
        self.model = model
        self.statistics = statistics
        self.calls = 0  # of this session, skipped ones among them
        self._id = ModelId.of(model)
        if statistics.model is not None:
            statistics.model.check(self._id, "the statistics to go on with")
        self._observer = observer
        self._seed = seed
        self._progress = progress
        self._skip = skip
        self._autosave: str | os.PathLike[str] | None = None
        self._every = self._saved = 0.0
        self._first = True
        # Updates of statistics, and taking them back, are not one step: calls of several threads wait for each other.
        self._lock = threading.RLock()
        self._compiled: Compiled = model
        self._watcher: Observer | None = None
        self.watch()

    def watch(self) -> None:
        """Let Dynamo trace the model anew, with an observer that has met no graph."""
        self.close()
        self._watcher = self._observer()
        self.model.compile(backend=self._watcher)
        compiled = self.model._compiled_call_impl
        assert compiled is not None
        # Around the compiled call and not in a hook, which Dynamo would trace and guard.
        self._compiled, self.model._compiled_call_impl = compiled, self

    def close(self) -> None:
        """Let go of the model's float weights, which the observer keeps alive while it watches."""
        if self._watcher is not None:
            self._watcher.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and count the call; one that raises leaves no trace in the statistics."""
        with self._lock:
            return self._call(args, kwargs)

    def _call(self, args: Any, kwargs: Any) -> Any:
        before = self.statistics.snapshot()
        result, journal = self._attempt(before, args, kwargs)
        pieces = self.statistics.graphs - before.graphs
        if self._first and pieces > 1:
            # A first call may fill a cache in a way that breaks the graph (Z-Image's table of rotations), which splits
            # regions and makes intermediate values look like inputs. So it is run once more, and that run counts;
            # where it comes in pieces again, the model is like that. The caller gets the first result.
            log.info("the first call came in %d graphs; it is run once more", pieces)
            self._undo(journal, before)
            devices = {p.device.index for p in self.model.parameters() if p.is_cuda}
            with torch.random.fork_rng(devices=sorted(devices)):
                self._attempt(before, args, kwargs)
        self._first = False
        self.calls += 1
        self._progress.called()
        if self._autosave is not None and time.monotonic() - self._saved >= self._every:
            self.try_to_save()
        return result

    def save_to(self, path: str | os.PathLike[str] | None, every: float) -> None:
        """Save the statistics in `path`, if there is one, each `every` seconds."""
        self._autosave, self._every, self._saved = path, every, time.monotonic()

    def save(self) -> None:
        """Save the statistics in the file of `save_to`, if there are any."""
        if self._autosave is not None and self.statistics.calls:
            save_statistics(self.statistics, self._autosave)
            self._saved = time.monotonic()

    def try_to_save(self) -> None:
        """`save`, but a full disk costs no calibration: the log says so, and the statistics go on in memory."""
        try:
            self.save()
        except CalibrationError as error:
            log.warning("calibration goes on without its file: %s", error)
            self._saved = time.monotonic()

    def _attempt(self, before: Statistics, args: Any, kwargs: Any) -> tuple[Any, observe.Journal]:
        if self._watcher is not None:
            self._watcher.begin(tensors((args, kwargs)))
        with observe.journal() as journal, every_graph():
            try:
                result = self._compiled(*args, **kwargs)
                if self.calls < self._skip:
                    journal.undo()
                else:
                    self.statistics.calls += 1
                    self.statistics.seeds |= {self._seed}
                    self.statistics.model = self._id
                    self.statistics.inputs |= set(given_to(self.model, args, kwargs))
                    self.statistics.broken |= self.statistics.graphs - before.graphs > 1
            except BaseException:
                self._undo(journal, before)
                raise
        return result, journal

    def _undo(self, journal: observe.Journal, before: Statistics) -> None:
        """Take back the call: its rows, its graphs, and the compiled code that knows their statistics."""
        journal.undo()
        self.statistics.restore(before)
        self.watch()
