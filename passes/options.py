"""The ways to treat one point, and what each costs on the rows for fitting.

    order      of the model's columns: what a fold brings (free at run time), or a gather (a kernel reads in that order)
    rotation   of the blocks inside a group, or none
    clip       of the largest magnitude of each group

Where a gather is not clearly better than what costs nothing, the latter is taken: its cost counts for more by a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pq_fx.passes.candidates import gather_order, regroups, rotation_size
from pq_fx.passes.evaluate import PointErrors
from pq_fx.passes.regions import Point


class Option(NamedTuple):
    """One way to treat one point: `order` of the model's columns, and what brings it about."""

    order: np.ndarray | None
    rotation: int
    gather: bool
    alpha: float | None
    clip: float = 1.0

    def differs(self, kept: Option) -> bool:
        """Whether this is not the model's own order, unclipped, in the rotation that is settled."""
        return self.order is not None or self.rotation != kept.rotation or self.clip != 1.0


KEEP = Option(None, 0, False, None)


def best_gather(
    point: Point,
    errors: Mapping[str, PointErrors],
    profiles: Mapping[float, Mapping[str, np.ndarray]],
) -> list[Option]:
    """The best gather of a point's tensor, alone in a list; none for a tensor that no kernel quantizes."""
    options: list[Option] = []
    measure = errors[point.name]
    if measure.activation is None:
        return options
    for alpha, profile in profiles.items():
        order = gather_order(profile[point.name])
        if any(regroups(order, g) for g in group_sizes(measure)):
            options += [Option(order, r, True, alpha) for r in rotation_sizes(point, measure)]
    return [cheapest(measure, options)] if options else []


def group_sizes(measure: PointErrors) -> set[int]:
    """Group sizes of a point's input and of its weights."""
    formats = [own.weight for own in measure.settings.values()]
    formats += [] if measure.activation is None else [measure.activation]
    return {fmt.group_size for fmt in formats}


def rotation_sizes(point: Point, measure: PointErrors) -> tuple[int, ...]:
    """Sizes of the rotated blocks that are tried for a point's input; 0 = none."""
    own = measure.settings[point.linears[0]]
    if point.name in own.rotations:
        return (own.rotations[point.name],)
    if not own.rotate or measure.activation is None:
        return (0,)
    size = rotation_size(point.channels, tuple(sorted(group_sizes(measure))))
    return (0, size, size // 2) if own.half_rotate and size > 2 else (0, size)


def cheapest(measure: PointErrors, options: Sequence[Option], margin: float = 0.0) -> Option:
    """The option that costs least; of equals the first."""
    return min(options, key=lambda option: cost(measure, option, margin))


def cost(measure: PointErrors, option: Option, margin: float) -> float:
    """Error on the rows for fitting; a gather's counts for more, so that it must win clearly."""
    error = sum(measure(option.order, option.rotation, option.clip).fit.values())
    if not option.gather:
        return error
    return error / (1.0 - margin) if margin < 1.0 else float("inf")
