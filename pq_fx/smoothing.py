"""Smoothing a region's points: scales into weights, their inverses into producers or into the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pq_fx.edits import Edits
from pq_fx.passes.choice import OwnSettings, RegionChoice
from pq_fx.passes.observe import Moments
from pq_fx.passes.regions import Point, Region
from pq_fx.passes.smooth import Smoothing, smooth_scale
from pq_fx.plan import Plan


@dataclass
class Smoothed:
    """A smoothed point: s fp32 [K] in the model's order, and whether 1 / s was folded."""

    scale: Tensor
    folded: bool
    before: dict[str, float]  # errors without smoothing, by weight name


def smooth_region(
    view: Region,
    plan: Plan,
    moments: Mapping[str, Moments],
    edits: Edits,
    settings: OwnSettings,
) -> dict[str, Smoothed]:
    """Search each point's scale and enter it into `edits`; by point name, unsmoothed points left out."""
    done = {}
    for point in view.points:
        weights = {name: edits.scaled(name) for name in point.linears}
        found = smooth_scale(point, moments, weights, settings)
        if found is None:
            continue
        scale, folded = _fold(view, point, plan, edits, found)
        for name in point.linears:
            edits.scale(name, 1, scale)
        done[point.name] = Smoothed(scale, folded, found.before)
    return done


def _fold(
    view: Region, point: Point, plan: Plan, edits: Edits, found: Smoothing
) -> tuple[Tensor, bool]:
    """The scale (equal for columns that hold one channel, where it folds) and whether it was folded."""
    scale = found.scale
    params = plan.scale_params.get(point.linears[0], ())
    region = plan.regions.get(view.name)
    # Nothing but this point's linears reads what `params` produce (passes/scales.py), whatever points share the region;
    # a point that was split, or whose linears are partly left in float, has other readers.
    if not params or region is None or point not in region.points:
        return scale, False
    norm = all(edits.tensors[p].dim() == 1 and len(edits.tensors[p]) == len(scale) for p in params)
    if norm and not region.foldable:
        for name in params:
            edits.scale(name, 0, 1.0 / scale)
        return scale, True
    axes = {a.param: a.channels for a in region.axes if a.axis == 0}
    if not all(name in axes for name in params):
        return scale, False
    columns = region.columns[point.name]
    channels = int(columns.max()) + 1
    counts = np.bincount(columns, minlength=channels)
    logs = np.bincount(columns, weights=scale.log().cpu().double().numpy(), minlength=channels)
    if any((axes[name] >= channels).any() for name in params) or (counts == 0).any():
        return scale, False
    by_channel = torch.from_numpy(np.exp(logs / counts)).to(scale)
    for name in params:
        held = torch.from_numpy(axes[name]).to(scale.device)
        factor = torch.where(held >= 0, 1.0 / by_channel[held.clamp(min=0)], 1.0)
        edits.scale(name, 0, factor)
    return by_channel[torch.from_numpy(columns).to(scale.device)], True


def smoothed_moments(moments: Moments, scale: Tensor) -> Moments:
    """Statistics of x / s."""
    inverse = (1.0 / scale).to(moments.rows.device)
    return replace(
        moments,
        sum_squares=moments.sum_squares * inverse.double().square(),
        amax=moments.amax * inverse,
        rows=(moments.rows.float() * inverse).to(moments.rows.dtype),
    )


def with_errors_before(choice: RegionChoice, smoothed: Mapping[str, Smoothed]) -> RegionChoice:
    """The choice with errors measured against the model as it was, not against the smoothed one."""
    errors = dict(choice.errors)
    for own in smoothed.values():
        for name, before in own.before.items():
            errors[name] = replace(errors[name], before=before)
    return replace(choice, errors=errors)
