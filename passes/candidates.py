"""Orders of channels worth trying: sorts by the joint second moment, folded or gathered.

Sorting puts channels of like size into one group, so that no channel pays for a neighbor's scale
(PermuQuant, arXiv 2605.09503, section 4.1):

    v_i = mu2_a[i]**alpha * mu2_w[i]**(1 - alpha),  mu2_a = E[x_i^2], mu2_w = mean_n W[n, i]^2
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pq_fx.passes.fold import axis_index
from pq_fx.passes.regions import Region

# Below this fraction of the mean a second moment counts as zero: logarithms stay finite.
_TINY = 1e-12


def joint_profile(activation: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """log v of each column, float64 [K], for second moments float64 [K]; its mean is 0."""
    return alpha * _log(activation) + (1.0 - alpha) * _log(weight)


def _log(moment: np.ndarray) -> np.ndarray:
    mean = moment.mean() if moment.size else 0.0
    if not mean > 0:
        return np.zeros_like(moment)
    logs = np.log(np.maximum(moment / mean, _TINY))
    return logs - logs.mean()


def fold_order(region: Region, profiles: Mapping[str, np.ndarray]) -> np.ndarray:
    """The region's channels sorted inside their blocks, int64 [C]; `profiles` are log v by point.

    A channel that several columns hold (of several points, of repeated key-value heads) counts
    with the mean of its columns' logs, each point weighing the same.
    """
    channels = region.blocks.size
    total, holders = np.zeros(channels), np.zeros(channels)
    for point, profile in profiles.items():
        columns = region.columns[point]
        counts = np.bincount(columns, minlength=channels)
        sums = np.bincount(columns, weights=profile, minlength=channels)
        total += sums / np.maximum(counts, 1)
        holders += counts > 0
    value = total / np.maximum(holders, 1)
    perm = np.arange(channels)
    for block in np.unique(region.blocks[region.blocks >= 0]):
        members = np.flatnonzero(region.blocks == block)
        perm[members] = members[np.argsort(value[members], kind="stable")]
    return perm


def gather_order(profile: np.ndarray) -> np.ndarray:
    """All columns sorted by log v, int64 [K]."""
    return np.argsort(profile, kind="stable")


def column_order(region: Region, point: str, fold: np.ndarray | None) -> np.ndarray | None:
    """What a fold does to a point's columns: the column that comes to each position, or None."""
    if fold is None:
        return None
    order = axis_index(region.columns[point], fold)
    return None if np.array_equal(order, np.arange(order.size)) else order


def regroups(order: np.ndarray | None, group: int) -> bool:
    """Whether an order puts other channels together, for groups of this size (0 = a whole row)."""
    if order is None or group == 0 or order.size % group:
        return False
    home = (order // group).reshape(-1, group)
    return bool((home != home[:, :1]).any())


def after_fold(fold: np.ndarray | None, order: np.ndarray) -> np.ndarray:
    """The gather that gives `order` of the model's columns when `fold` has moved them already."""
    if fold is None:
        return order
    return np.argsort(fold, kind="stable")[order]


def rotation_size(channels: int, groups: tuple[int, ...]) -> int:
    """Largest power of two that divides the group (the first nonzero of `groups`, else a row)."""
    size = next((g for g in groups if g), channels)
    return size & -size
