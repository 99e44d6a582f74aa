"""Scales and centers of a region's points: into weights and biases, their inverses into producers or the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pq_fx.edits import Edits, Scaled
from pq_fx.methods import Method
from pq_fx.passes.balance import balance
from pq_fx.passes.choose import OwnSettings, RegionChoice
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import Point, Region
from pq_fx.passes.scales import Absorber
from pq_fx.passes.smooth import smooth_scale
from pq_fx.plan import Plan


@dataclass
class Smoothed:
    """A smoothed point, whose linears read (x - center) / scale, fp32 [K] in the model's order.

    `folded`: what produces x gives that already; else it is multiplied by 1 / scale in the graph, and center is 0.
    """

    scale: Tensor
    center: Tensor
    folded: bool
    before: dict[str, float]  # errors without smoothing, by weight name


def smooth_region(
    view: Region,
    plan: Plan,
    moments: Mapping[str, Moments],
    edits: Edits,
    settings: OwnSettings,
    recipe: Method,
) -> dict[str, Smoothed]:
    """Search each point's scale (and center) and enter it into `edits`; by point name, unsmoothed points left out."""
    done = {}
    for point in view.points:
        weights = Scaled(edits, point.linears)
        fold = _Fold.of(view, point, plan, edits)
        if recipe.smooth:
            wanted = smooth_scale(point, moments, weights, settings)
            found = None if wanted is None else (wanted.scale, None, wanted.before)
        else:
            may_center = recipe.center and fold is not None and fold.takes_offset
            balanced = None
            if fold is not None:
                balanced = balance(
                    point, moments, weights, settings, scale=recipe.balance, center=may_center
                )
            found = None if balanced is None else tuple(balanced)
        if found is None:
            continue
        scale, center, before = found
        center = torch.zeros_like(scale) if center is None else center
        if fold is not None:
            scale, center = fold.enter(edits, scale, center)
        for name in point.linears:
            if bool(center.any()):
                edits.center(name, _bias(name), center)
            edits.scale(name, 1, scale)
        done[point.name] = Smoothed(scale, center, fold is not None, before)
    return done


@dataclass(frozen=True)
class _Fold:
    """Where a point's scale and center go: each absorber's positions with the channels that they hold (-1: another's).

    `columns` int64 [K] are the channels of the point's columns.
    """

    columns: np.ndarray
    places: tuple[tuple[Absorber, np.ndarray], ...]
    takes_offset: bool

    @classmethod
    def of(cls, view: Region, point: Point, plan: Plan, edits: Edits) -> _Fold | None:
        """The fold, or None where the scale stays a multiplication."""
        absorbers = plan.absorbers.get(point.linears[0], ())
        region = plan.regions.get(view.name)
        # Nothing but this point's linears reads what the absorbers produce, whatever points share the region;
        # a point that was split, or whose linears are partly left in float, has other readers.
        if not absorbers or region is None or point not in region.points:
            return None
        axes = {a.param: a.channels for a in region.axes if a.axis == 0}
        columns = region.columns[point.name] if region.foldable else np.arange(point.channels)
        places = []
        for absorber in absorbers:
            held = axes.get(absorber.param) if region.foldable else None
            if held is not None:
                held = held[absorber.start : absorber.stop]
            elif absorber.aligned and absorber.stop - absorber.start == point.channels:
                held = columns
            else:
                return None
            places.append((absorber, held))
        channels = int(columns.max()) + 1
        held_once = np.bincount(columns, minlength=channels) > 0
        if any((held >= channels).any() for _, held in places) or not held_once.all():
            return None
        biases = all(_bias(name) in edits.tensors for name in point.linears)
        offset = biases and any(a.kind == "offset" for a in absorbers)
        return cls(columns, tuple(places), offset)

    def enter(self, edits: Edits, scale: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """Enter the inverse; returns scale and center as entered, equal for columns that hold one channel."""
        by_scale = self._by_channel(scale.log()).exp()
        by_center = self._by_channel(center)
        for absorber, held in self.places:
            rows = torch.from_numpy(held).to(scale.device)
            own = rows >= 0
            factor = torch.where(own, 1.0 / by_scale[rows.clamp(min=0)], 1.0)
            edits.scale(absorber.param, 0, self._placed(edits, absorber, factor, 1.0))
            offset = torch.zeros_like(factor)
            if absorber.kind == "offset":
                offset = torch.where(own, -by_center[rows.clamp(min=0)] * factor, 0.0)
            elif absorber.kind == "one_plus":
                offset = factor - 1.0
            if bool(offset.any()):
                edits.shift(absorber.param, self._placed(edits, absorber, offset, 0.0))
        columns = torch.from_numpy(self.columns).to(scale.device)
        return by_scale[columns], by_center[columns]

    def _by_channel(self, value: Tensor) -> Tensor:
        mean = np.bincount(self.columns, weights=value.cpu().double().numpy())
        return torch.from_numpy(mean / np.bincount(self.columns)).to(value)

    @staticmethod
    def _placed(edits: Edits, absorber: Absorber, value: Tensor, rest: float) -> Tensor:
        whole = torch.full((edits.tensors[absorber.param].shape[0],), rest, device=value.device)
        whole[absorber.start : absorber.stop] = value
        return whole


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def smoothed_moments(moments: Moments, smoothed: Smoothed) -> Moments:
    """Statistics of (x - m) / s; sums and largest magnitudes are those of the sampled rows."""
    scale, center = (v.to(moments.rows.device) for v in (smoothed.scale, smoothed.center))
    rows = (moments.rows.float() - center).div_(scale)
    empty = torch.isinf(moments.keys).to(rows.device)
    rows[empty] = 0.0
    held = rows[~empty]
    return replace(
        moments,
        sum_squares=held.square().mean(dim=0).double() * int(moments.count),
        amax=held.abs().amax(dim=0),
        rows=rows.to(moments.rows.dtype),
    )


def with_errors_before(choice: RegionChoice, smoothed: Mapping[str, Smoothed]) -> RegionChoice:
    """The choice with errors measured against the model as it was, not against the smoothed one."""
    errors = dict(choice.errors)
    for own in smoothed.values():
        for name, before in own.before.items():
            errors[name] = replace(errors[name], before=before)
    return replace(choice, errors=errors)
