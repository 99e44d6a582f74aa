"""Absorbing a permutation: producers' rows and consumers' columns are reordered alike, and no operation remains.

    before   h = linear(x, W1, b1); y = linear(gelu(h), W2)
    after    h = linear(x, W1[p], b1[p]); y = linear(gelu(h), W2[:, p])            W1' = W1[p], W2' = W2[:, p]

The algebra is the network's symmetry (channels.py): every axis that holds a region's channels follows the region's
permutation, whichever parameter it belongs to (rows, biases, norm weights, columns).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pq_fx.errors import GraphError
from pq_fx.passes.regions import Region


def axis_index(channels: np.ndarray, perm: np.ndarray) -> np.ndarray:
    """The positions that an axis is read from after its region is permuted.

    `channels[j]` (int64 [n]) is the region's channel at position j, or -1 for a position that stays; `perm` (int64
    [C]) puts channel `perm[c]` where channel c was. A channel that stands several times on the axis (both halves of a
    gated unit, repeated key-value heads) moves occurrence by occurrence, in order. Returns `index`, int64 [n], for
    `new = old[index]`. Raises GraphError when two channels that change places stand there unequally often.
    """
    index = np.arange(channels.size)
    held = np.flatnonzero(channels >= 0)
    if held.size == 0:
        return index
    own = channels[held]
    order = np.argsort(own, kind="stable")
    counts = np.bincount(own, minlength=perm.size)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    occurrence = np.empty(held.size, np.int64)
    occurrence[order] = np.arange(held.size) - np.repeat(first[counts > 0], counts[counts > 0])
    wanted = perm[own]
    if not np.array_equal(counts[wanted], counts[own]):
        raise GraphError(
            "a permutation exchanges channels that an axis holds unequally often; regions.py is wrong"
        )
    index[held] = held[order][first[wanted] + occurrence]
    return index


def fold_tensors(
    region: Region, perm: np.ndarray, tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[tuple[str, int], torch.Tensor]:
    """For each axis of the region, the index tensor (int64) that reorders it; identities are left out.

    `tensors` maps the region's parameters to tensors, on whose devices the indices are (None: the CPU); nothing is
    changed here. Raises GraphError when `perm` is not a permutation, or moves a channel out of its block.
    """
    check_permutation(perm, region.blocks.size)
    if (
        not np.array_equal(region.blocks[perm], region.blocks)
        or (perm != np.arange(perm.size))[region.blocks < 0].any()
    ):
        raise GraphError(f"region {region.name}: the permutation moves a channel out of its block")
    result: dict[tuple[str, int], torch.Tensor] = {}
    for axis in region.axes:
        index = axis_index(axis.channels, perm)
        if not np.array_equal(index, np.arange(index.size)):
            device = "cpu" if tensors is None else tensors[axis.param].device
            result[axis.param, axis.axis] = torch.from_numpy(index).to(device)
    return result


def check_permutation(perm: np.ndarray, size: int) -> None:
    """Raise GraphError unless `perm` holds each of 0..size-1 once."""
    if perm.shape != (size,) or not np.array_equal(np.sort(perm), np.arange(size)):
        raise GraphError(
            f"expected a permutation of 0..{size - 1}, found {perm.shape} with repeats or gaps"
        )
