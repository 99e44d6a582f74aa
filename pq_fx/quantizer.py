"""`prepare` a float model, `calibrate` it by running it, `convert` it: the three steps of quantization."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pq_fx import applied, integrations, seen
from pq_fx.calibrate import Observer
from pq_fx.config import QuantConfig
from pq_fx.convert import convert, out_of_memory
from pq_fx.distributed import all_reduce, own_seed
from pq_fx.errors import CalibrationError, ConfigError
from pq_fx.modules import quantized_linears
from pq_fx.passes._torch import graph_breaks
from pq_fx.pointwise import linearized
from pq_fx.progress import CalibrationProgress
from pq_fx.report import LayerReport, Report
from pq_fx.session import Session
from pq_fx.statistics import ModelId, Statistics
from pq_fx.statistics_file import load_statistics, save_statistics
from pq_fx.unfit import refuse_unfit

log = logging.getLogger("pq_fx")


class Quantizer:
    """Quantizes one model in place.

    >>> quantizer = pq_fx.prepare(pipe.transformer, pq_fx.QuantConfig("int4", group_size=64))
    >>> with quantizer.calibrate():
    ...     pipe(prompts)
    >>> report = quantizer.convert()
    """

    def __init__(
        self, model: nn.Module, config: QuantConfig, statistics: Statistics | None = None
    ) -> None:
        self.model = model
        self.config = config
        self._statistics = statistics if statistics is not None else Statistics()
        self._converted = False
        self._progress: CalibrationProgress | None = None

    @property
    def calls(self) -> int:
        """Whole calls of the model that the statistics hold, those of earlier runs among them."""
        return self._statistics.calls

    @contextmanager
    def calibrate(
        self,
        *,
        total: int | None = None,
        skip: int = 0,
        autosave: str | os.PathLike[str] | None = None,
        autosave_seconds: float = 300.0,
        progress: bool | None = None,
    ) -> Iterator[Quantizer]:
        """While this is open, calls of the model gather statistics; results are the float model's own.

        May be opened several times; statistics add up. A call counts when it is complete: one that is interrupted or
        raises leaves no trace, and what earlier ones gathered is kept, for `convert` or `save_statistics`. A first call
        that comes in several graphs is run twice, since filling a cache may have broken the graph.

        Args:
            total: calls there will be in all, to tell the time left.
            skip: run this many calls without counting them, to repeat a run whose first calls are in the statistics
                already: ``calibrate(skip=quantizer.calls)`` around the same calls.
            autosave: file to save the statistics in now and then, and at the end, also at an interruption.
            autosave_seconds: time between two saves.
            progress: True draws, False is silent; None draws on a terminal and logs a line a call elsewhere.

        Raises:
            CalibrationError: no call was made, the model cannot be quantized as it is (unfit.py: converted already,
                offloaded by parts, with an adapter, sharded), or the statistics that it starts from belong to another
                model or keep another number of rows. At the end, where `autosave` cannot be written; the statistics are
                kept, for `save_statistics` somewhere else or `convert`.
        """
        if self._converted:
            raise CalibrationError(
                "this model is converted already; calibration needs the float model"
            )
        # accelerate's hook around a whole model brings its weights for each call.
        refuse_unfit(self.model, data=not hasattr(self.model, "_hf_hook"))
        gathered = self._statistics
        gathered.check_rows(self.config.calibration_rows)
        before = getattr(self.model, "_compiled_call_impl", None)
        shown = self._progress = CalibrationProgress(gathered, total, show=progress)
        with linearized(self.model):
            session = Session(self.model, gathered, self.observer, self._seed, shown, skip)
            session.save_to(autosave, autosave_seconds)
            try:
                with graph_breaks() as breaks, shown:
                    yield self
            except BaseException as error:
                if gathered.calls:
                    what = (
                        "interrupted"
                        if isinstance(error, KeyboardInterrupt)
                        else type(error).__name__
                    )
                    log.info(
                        "%s after %d calls; the quantizer keeps what they gathered",
                        what,
                        gathered.calls,
                    )
                    session.try_to_save()
                raise
            finally:
                self.model._compiled_call_impl = before
                session.close()
        for reason, count in breaks.items():
            log.info("Dynamo broke the graph %d times, where regions end: %s", count, reason)
        if session.calls == 0:
            raise CalibrationError(
                f"{type(self.model).__name__} was not called inside calibrate(); run the pipeline that uses it there"
            )
        session.save()

    def expect(self, total: int) -> None:
        """Say, inside `calibrate`, how many calls there will be in all, when it becomes known."""
        if self._progress is not None:
            self._progress.total = total

    def save_statistics(self, path: str | os.PathLike[str]) -> None:
        """Write what was gathered into a file for `prepare(model, config, statistics=path)`.

        A calibration that goes on from it (same config, the same calls but for those it holds) gives the same bits as
        one that was never interrupted. Raises CalibrationError when nothing was gathered.
        """
        save_statistics(self._statistics, path)

    def all_reduce(self, group: Any = None) -> None:
        """Add up the statistics of all processes of torch.distributed (or of `group`); all end with the same.

        Every process must call it, once, after its own calibration on its own share of the prompts. Raises
        CalibrationError, on all alike, when they cannot be added up.
        """
        self._statistics = all_reduce(self._statistics, group)

    def observer(self) -> Observer:
        """A Dynamo backend that gathers this quantizer's statistics."""
        return Observer(self.model, self._statistics, self.config.calibration_rows, self._seed)

    @property
    def _seed(self) -> int:
        """Of this process's samples."""
        return own_seed(self.config.seed)

    def count_call(self) -> None:
        """Note that the model was called once."""
        self._statistics.calls += 1
        self._statistics.seeds |= {self._seed}

    def statistics(self) -> Statistics:
        """What was gathered; pass it to `prepare(copy, other_config, statistics=...)` to calibrate once for several."""
        return self._statistics

    def convert(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """Choose, fold and pack; the model is quantized in place and the report says what was done to each layer.

        Raises CalibrationError when calibration is missing, not finite, or of another model, or when this one cannot be
        quantized as it is (unfit.py), and DeviceMemoryError when a GPU has too little memory beside the float model;
        the model is unchanged then.
        """
        if self._converted:
            raise CalibrationError("this model is converted already")
        names = [fqn for fqn in self._statistics.plan.linears]
        unmatched = self.config.unmatched(names)
        if unmatched and names:
            raise ConfigError(f"these rules match no linear of the model: {', '.join(unmatched)}")
        refuse_unfit(self.model, data=True)
        # What is packed now must be usable outside inference mode, too.
        with torch.inference_mode(False), linearized(self.model):
            self._statistics.check_model(self.model)
            unseen = self._statistics.unseen_modules(self.model)
            try:
                report = convert(self.model, self._statistics, self.config, progress)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(self.model, error) from error
        if applied.of_model(self.model):  # else every channel is where the float model has it
            seen.attach(self.model, self._statistics.inputs, unseen)
        report = replace(report, layers=(*report.layers, *self._not_seen()))
        self._converted = True
        self.model.quantization_report = report  # type: ignore[assignment]
        integrations.adopt(self.model)
        log.info("%s", report.summary)
        return report

    def _not_seen(self) -> list[LayerReport]:
        """A row for each linear that no graph of the calibration showed."""
        plan, modules = self._statistics.plan, dict(self.model.named_modules())
        tied = {
            id(modules[n].weight) for n in plan.linears if isinstance(modules.get(n), nn.Linear)
        }
        return [
            LayerReport(
                name,
                module.in_features,
                module.out_features,
                skip_reason="its weight is another linear's"
                if id(module.weight) in tied
                else "no call of the calibration reached it",
            )
            for name, module in modules.items()
            if type(module) is nn.Linear and name not in plan.linears
        ]


def prepare(
    model: nn.Module,
    config: QuantConfig | str | dict[str, object] | None = None,
    *,
    statistics: Statistics | str | os.PathLike[str] | None = None,
) -> Quantizer:
    """Get ready to quantize `model` in place.

    `config` is a QuantConfig, a preset's name ("w4a4-nvfp4") or a dict of settings. `statistics` of an earlier
    calibration of the same weights, or the file that `save_statistics` wrote, spare a new one or are added to.

    Raises ConfigError for a wrong setting, and CalibrationError for a model that is quantized already or statistics
    that cannot be read or belong to another model; nothing is changed here.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(inner, nn.Module):
        raise ConfigError(f"expected an nn.Module, found {type(model).__name__}")
    if quantized_linears(inner):
        raise CalibrationError(
            "this model has quantized linears already; prepare expects the float model that it was made from"
        )
    settings = QuantConfig.of(config)
    if isinstance(statistics, (str, os.PathLike)):
        statistics = load_statistics(statistics)
    if statistics is not None and statistics.model is not None:
        statistics.model.check(ModelId.of(inner), "these statistics")
    return Quantizer(inner, settings, statistics)
