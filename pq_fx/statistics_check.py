"""Whether statistics that were read from a file fit each other, before anything is computed from them."""

from __future__ import annotations

import numpy as np

from pq_fx.errors import CalibrationError
from pq_fx.passes.regions import Region
from pq_fx.passes.scales import KINDS
from pq_fx.plan import GraphFacts
from pq_fx.statistics import Statistics

TREATMENTS = ("quantize", "weight_only", "leave", "impossible")


def check_restored(statistics: Statistics) -> None:
    """Raise CalibrationError unless regions, linears and moments name each other rightly and are of matching sizes."""
    _require(statistics.calls > 0, f"it counts {statistics.calls} calls")
    for facts in statistics.plan.graphs:
        _check_linears(facts)
        for name, region in facts.regions.items():
            _require(isinstance(name, str), f"{name!r} is no name of a region")
            _check_region(region, facts)
            for point in region.points:
                moments = statistics.moments.get(point.name)
                held = None if moments is None else moments.sum_squares.numel()
                _require(
                    held == point.channels,
                    f"{point.name} has {point.channels} channels and its moments {held}",
                )


def _check_linears(facts: GraphFacts) -> None:
    for fact in facts.linears:
        texts = fact.fqn, fact.treatment, fact.reason
        sizes = fact.in_features, fact.out_features
        good = all(isinstance(t, str) for t in texts) and all(
            type(n) is int and n > 0 for n in sizes
        )
        _require(good and fact.treatment in TREATMENTS, f"{fact} describes no linear")
    for point, own in facts.absorbers.items():
        good = all(
            isinstance(a.param, str)
            and a.param in facts.params
            and a.kind in KINDS
            and type(a.start) is type(a.stop) is int
            and 0 <= a.start < a.stop
            and type(a.aligned) is bool
            for a in own
        )
        _require(good, f"what takes over scales of {point} is not in its graph")


def _check_region(region: Region, facts: GraphFacts) -> None:
    name, count = region.name, region.blocks.size
    _require(
        region.blocks.ndim == 1 and bool((region.blocks >= -1).all()), f"{name} has odd blocks"
    )
    _require(bool(region.points) and type(region.stream) is bool, f"{name} is no region")
    sizes = {f"{fact.fqn}.weight": fact.in_features for fact in facts.linears}
    for point in region.points:
        columns = region.columns.get(point.name)
        fits = columns is not None and columns.shape == (point.channels,)
        _require(fits and _within(columns, 0, count), f"{point.name} has odd columns")
        _require(bool(point.linears), f"{point.name} has no linears")
        for linear in point.linears:
            _require(sizes.get(linear) == point.channels, f"{linear} does not read {point.name}")
    for axis in region.axes:
        _require(
            type(axis.axis) is int and axis.axis in range(8),
            f"{axis.param} has no axis {axis.axis!r}",
        )
        good = axis.param in facts.params and axis.channels.ndim == 1
        _require(good and _within(axis.channels, -1, count), f"{axis.param} has odd channels")


def _within(values: np.ndarray | None, low: int, high: int) -> bool:
    return values is not None and bool(((values >= low) & (values < high)).all())


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise CalibrationError(f"these statistics do not fit each other ({found}); calibrate again")
