"""Choosing how each region's channels are ordered and rotated, and whether that is worth it.

    sampled rows   half to fit on      profile -> orders by alpha -> the best candidate
                   half to accept on   (E_orig - E_best) / E_orig > tau, else the model's own order

A candidate is a fold of the region (free at run time) or none, and for each of its points a gather
or none (a kernel reads its input in another order), each with and without a block rotation. Where
a gather is not clearly better than what costs nothing, the latter is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pq_fx.passes.candidates import (
    after_fold,
    column_order,
    fold_order,
    joint_profile,
    regroups,
)
from pq_fx.passes.choice import (
    LinearError,
    OwnSettings,
    PointChoice,
    RegionChoice,
    Settings,
    settings_of,
)
from pq_fx.passes.evaluate import GLOBAL_SCALE_ROOM, PointErrors, Slot
from pq_fx.passes.moments import Moments
from pq_fx.passes.options import (
    KEEP,
    Option,
    best_gather,
    cheapest,
    cost,
    group_sizes,
    rotation_sizes,
)
from pq_fx.passes.refine import homes, refine
from pq_fx.passes.regions import Point, Region
from pq_fx.passes.sampled import Measured, check, halves, measured, second_moments
from pq_fx.passes.turned import Matrix

__all__ = ["LinearError", "PointChoice", "RegionChoice", "Settings", "choose"]


class _Plan(NamedTuple):
    """A treatment of the whole region."""

    fold: np.ndarray | None
    alpha: float | None
    options: dict[str, Option]


def choose(
    region: Region,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Matrix],
    settings: OwnSettings,
) -> RegionChoice:
    """Choose fold, gathers and rotations of one region.

    `moments` are by point name; `weights` (float [N, K], by weight name) are the model's own, whose
    device does the work; they may make some rows at a time. `settings` may differ by linear in
    formats; what concerns the region as a whole (alphas, tau, ...) is the first linear's.
    Deterministic. Raises CalibrationError when a point saw no rows, or some that were not finite,
    or when a weight is not finite.
    """
    every = {n: settings_of(settings, n) for p in region.points for n in p.linears}
    first = every[region.points[0].linears[0]]
    errors: dict[str, PointErrors] = {}
    seconds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    enough, slot = True, Slot()

    device = weights[region.points[0].linears[0]].device

    def load(point: Point) -> Measured:
        return measured(*halves(point, moments), first, device)

    for point in region.points:
        check(point, moments, weights)
        fit, held = halves(point, moments)
        enough = enough and len(fit) > 0 and len(held) > 0
        seconds[point.name] = second_moments(point, fit, weights)
        errors[point.name] = PointErrors(
            partial(load, point),
            point.linears,
            weights,
            every,
            one_row=point.one_row,
            center=first.centers.get(point.name),
            slot=slot,
        )
    settled = first.rotations
    kept = {p.name: KEEP._replace(rotation=settled.get(p.name, 0)) for p in region.points}
    keep = _Plan(None, None, kept)
    if not enough:
        return _result(region, errors, keep, keep, "kept: too few rows to fit and to accept on")
    best = _best(region, errors, seconds, first)
    best = best._replace(options=_clipped(region, errors, best))
    if first.refine:
        best = _refined(region, errors, best, lambda p: load(p).rows, seconds, first)
        best = best._replace(options=_clipped(region, errors, best))
    if not any(o.differs(kept[name]) for name, o in best.options.items()):
        return _result(region, errors, keep, keep, "kept: no candidate has less error")
    before, after = _held(errors, keep), _held(errors, best)
    gain = (before - after) / before if before > 0 else 0.0
    if gain > first.tau:
        return _result(region, errors, keep, best, f"accepted: held-out error {-gain:+.1%}")
    reason = f"kept: gain {gain:.2%} on held-out rows is not above tau {first.tau:.2%}"
    return _result(region, errors, keep, keep, reason)


def _best(
    region: Region,
    errors: Mapping[str, PointErrors],
    seconds: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: Settings,
) -> _Plan:
    """The plan with the least error on the rows for fitting; of equals the simplest."""
    profiles = {
        alpha: {name: joint_profile(*moment, alpha) for name, moment in seconds.items()}
        for alpha in (settings.alphas if settings.sort else ())
    }
    folds: list[tuple[np.ndarray | None, float | None]] = [(None, None)]
    groups = {name: group_sizes(measure) for name, measure in errors.items()}
    if region.foldable:
        for alpha, profile in profiles.items():
            fold = fold_order(region, profile)
            orders = {p.name: column_order(region, p.name, fold) for p in region.points}
            # Else the same channels share a scale as before.
            if any(regroups(order, g) for name, order in orders.items() for g in groups[name]):
                folds.append((fold, alpha))
    margin = settings.gather_margin
    plans = [_Plan(fold, alpha, {}) for fold, alpha in folds]
    totals = [0.0] * len(plans)
    # Point by point, because a device holds the rows and weights of one.
    for point in region.points:
        measure = errors[point.name]
        gathers = best_gather(point, errors, profiles)
        for i, plan in enumerate(plans):
            order = column_order(region, point.name, plan.fold)
            free = [Option(order, r, False, plan.alpha) for r in rotation_sizes(point, measure)]
            option = plan.options[point.name] = cheapest(measure, free + gathers, margin)
            # Gathers pay their margin here too, or one would beat a fold that gives the same order.
            totals[i] += cost(measure, option, margin)
    return plans[totals.index(min(totals))]


def _clipped(region: Region, errors: Mapping[str, PointErrors], plan: _Plan) -> dict[str, Option]:
    """The plan's options with each point's best clip ratio."""
    options = dict(plan.options)
    for point in region.points:
        measure = errors[point.name]
        if measure.activation is not None:
            clips = measure.settings[point.linears[0]].clips
            own = options[point.name]
            measure.with_clips(own.order, own.rotation, clips)
            tried = [own._replace(clip=ratio) for ratio in (1.0, *clips)]
            options[point.name] = cheapest(measure, tried)
    return options


def _refined(
    region: Region,
    errors: Mapping[str, PointErrors],
    plan: _Plan,
    fitting: Callable[[Point], Tensor],
    seconds: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: Settings,
) -> _Plan:
    """The plan with orders improved by swaps: by folding where one point owns the region, else by
    gathers, where they are better by the margin."""
    options, fold = dict(plan.options), plan.fold
    for point in region.points:
        activation = errors[point.name].activation
        if activation is None:
            continue
        own = options[point.name]
        start = np.arange(point.channels) if own.order is None else own.order
        columns = region.columns[point.name]
        alone = len(region.points) == 1 and np.array_equal(
            np.sort(columns), np.arange(len(columns))
        )
        tried = [own]
        for free in (False, True) if alone and region.foldable and not own.gather else (True,):
            rows = fitting(point)[: settings.fit_rows].float()
            order = refine(
                rows,
                torch.from_numpy(seconds[point.name][1]).to(rows),
                start,
                None if free else homes(region.blocks[columns]),
                activation,
                rotation=own.rotation,
                clip=own.clip,
                steps=settings.refine,
                room=GLOBAL_SCALE_ROOM,
                seed=settings.seed,
            )
            if not np.array_equal(order, start):
                tried.append(own._replace(order=order, gather=free))
        best = cheapest(errors[point.name], tried, settings.gather_margin)
        options[point.name] = best
        if best is not own and not best.gather:
            assert best.order is not None
            fold = np.empty_like(columns)
            fold[columns] = columns[best.order]
    return _Plan(fold, plan.alpha, options)


def _held(errors: Mapping[str, PointErrors], plan: _Plan) -> float:
    options = plan.options.items()
    return sum(sum(errors[name](o.order, o.rotation, o.clip).held.values()) for name, o in options)


def _result(
    region: Region, errors: Mapping[str, PointErrors], keep: _Plan, plan: _Plan, reason: str
) -> RegionChoice:
    """Spell a plan out: gathers relative to the folded order, what absorbs them, errors."""
    # Where every point gathers its own order, a fold would change nothing.
    fold = None if all(o.gather for o in plan.options.values()) else plan.fold
    points, absorb, found = {}, {}, {}
    for point in region.points:
        option = plan.options[point.name]
        folded = column_order(region, point.name, fold)
        perm = None
        if option.gather:
            assert option.order is not None
            perm = after_fold(folded, option.order)
            absorb[point.name] = point.absorb
        else:
            absorb[point.name] = "none" if folded is None else region.fold_name
        points[point.name] = PointChoice(perm, option.rotation, option.clip)
        before = errors[point.name].original().held
        after = errors[point.name](option.order, option.rotation, option.clip).held
        for name in point.linears:
            found[name] = LinearError(before[name], after[name])
    alphas = [o.alpha for o in plan.options.values() if o.gather]
    return RegionChoice(
        fold=fold,
        points=points,
        absorb=absorb,
        alpha=plan.alpha if fold is not None or not alphas else alphas[0],
        accepted=plan is not keep or any(o.rotation for o in keep.options.values()),
        rotation=max((o.rotation for o in plan.options.values()), default=0),
        errors=found,
        reason=reason,
    )
