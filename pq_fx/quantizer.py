"""`prepare` a float model, `calibrate` it by running it, `convert` it: the three steps of quantization."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pq_fx import integrations
from pq_fx.calibrate import Observer, Statistics
from pq_fx.config import QuantConfig
from pq_fx.convert import convert
from pq_fx.errors import CalibrationError, ConfigError
from pq_fx.modules import quantized_linears
from pq_fx.passes._torch import every_graph
from pq_fx.pointwise import linearized
from pq_fx.report import Report

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

    @contextmanager
    def calibrate(self) -> Iterator[Quantizer]:
        """While this is open, calls of the model gather statistics; results are the float model's own.

        May be opened several times; statistics add up. Raises CalibrationError when no call was made.
        """
        if self._converted:
            raise CalibrationError(
                "this model is converted already; calibration needs the float model"
            )
        before = getattr(self.model, "_compiled_call_impl", None)
        calls = self._statistics.calls
        compiled: Callable[..., Any]

        def watch() -> None:
            # A new backend object each time: Dynamo traces anew.
            nonlocal compiled
            self.model.compile(backend=self.observer())
            assert self.model._compiled_call_impl is not None
            compiled, self.model._compiled_call_impl = self.model._compiled_call_impl, call

        def call(*args: Any, **kwargs: Any) -> Any:
            # Around the compiled call and not in a hook, which Dynamo would trace and guard.
            if self._came_in_pieces():
                self._statistics.forget()
                watch()
            result = compiled(*args, **kwargs)
            self.count_call()
            return result

        try:
            with every_graph() as breaks, linearized(self.model):
                watch()
                yield self
        finally:
            self.model._compiled_call_impl = before
        for reason, count in breaks.items():
            log.info("Dynamo broke the graph %d times, where regions end: %s", count, reason)
        if self._statistics.calls == calls:
            raise CalibrationError(
                f"{type(self.model).__name__} was not called inside calibrate(); run the pipeline that uses it there"
            )

    def _came_in_pieces(self) -> bool:
        """Whether the one call so far was broken into several graphs.

        A first call may fill a cache in a way that breaks the graph (Z-Image's table of rotations), which splits
        regions and makes intermediate values look like inputs, and Dynamo would go on with the pieces. The second call
        is watched anew; where it comes in pieces again, nothing but the first call's rows is lost.
        """
        pieces = self._statistics.graphs if self._statistics.calls == 1 else 1
        if pieces > 1:
            log.info("the first call came in %d graphs; calibration starts anew", pieces)
        return pieces > 1

    def observer(self) -> Observer:
        """A Dynamo backend that gathers this quantizer's statistics."""
        return Observer(
            self.model, self._statistics, self.config.calibration_rows, self.config.seed
        )

    def count_call(self) -> None:
        """Note that the model was called once."""
        self._statistics.calls += 1

    def statistics(self) -> Statistics:
        """What was gathered; pass it to `prepare(copy, other_config, statistics=...)` to calibrate once for several."""
        return self._statistics

    def convert(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """Choose, fold and pack; the model is quantized in place and the report says what was done to each layer.

        Raises CalibrationError when calibration is missing or not finite; the model is unchanged then.
        """
        if self._converted:
            raise CalibrationError("this model is converted already")
        names = [fqn for fqn in self._statistics.plan.linears]
        unmatched = self.config.unmatched(names)
        if unmatched and names:
            raise ConfigError(f"these rules match no linear of the model: {', '.join(unmatched)}")
        with linearized(self.model):
            report = convert(self.model, self._statistics, self.config, progress)
        self._converted = True
        self.model.quantization_report = report  # type: ignore[assignment]
        integrations.adopt(self.model)
        log.info("%s", report.summary)
        return report


def prepare(
    model: nn.Module,
    config: QuantConfig | str | dict[str, object] | None = None,
    *,
    statistics: Statistics | None = None,
) -> Quantizer:
    """Get ready to quantize `model` in place.

    `config` is a QuantConfig, a preset's name ("w4a4-nvfp4") or a dict of settings. `statistics` of an earlier
    calibration of the same weights spare a new one. Raises ConfigError for a wrong setting and CalibrationError for
    a model that is quantized already; nothing is changed here.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(inner, nn.Module):
        raise ConfigError(f"expected an nn.Module, found {type(model).__name__}")
    if quantized_linears(inner):
        raise CalibrationError(
            "this model has quantized linears already; prepare expects the float model"
        )
    return Quantizer(inner, QuantConfig.of(config), statistics)
