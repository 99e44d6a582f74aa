"""Refining an order of channels by swaps between groups, on the error that the swap really makes.

A sort looks at one number a channel. Whether two channels go well together also depends on when
they are large, on their means, and, under a rotation, on how they add up:

    order    groups (a b c d) (e f g h)     error of each group, on sampled rows
    try      groups (a b e d) (c f g h)     kept where the two groups' errors fall together

What a group's activations lose in the output is ||x_g - Q(x_g)||^2 times the mean energy of the
weight's columns in the group; errors of different groups are taken as independent. Groups are
paired at random, each pair tries one swap, all pairs at once, so a step costs one quantization of
the rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import fake_quantize, nvfp4_global_scale, rotate


def refine(
    rows: Tensor,
    weight_energy: Tensor,
    order: np.ndarray,
    blocks: np.ndarray | None,
    fmt: Format,
    *,
    rotation: int,
    clip: float,
    steps: int,
    room: float = 2.0,
    seed: int = 0,
) -> np.ndarray:
    """A better order than `order` (int64 [K]), or the same one; deterministic.

    Args:
        rows: fp32 [n, K], columns in the model's order.
        weight_energy: fp32 [K], mean square of each column of the weights.
        blocks: int64 [K] by column: only columns with equal numbers change places; None: any two.
        fmt: of the activations, with groups (a group of 0 is a whole row: nothing to refine).
        rotation: size of the Hadamard blocks, at most the group; 0 = none.
        clip: multiplies the largest magnitude of each group.
        steps: swaps that each group tries.
        room: of nvfp4's tensor scale above the rows' largest magnitude.
    """
    group, channels = fmt.group_size, rows.shape[1]
    count = channels // group if group else 0
    if count < 2 or channels % group or steps == 0:
        return order
    if blocks is not None and not _can_cross(blocks[order].reshape(count, group)):
        return order
    device = rows.device
    ratio = torch.tensor(clip, device=device)
    scale = nvfp4_global_scale(rows.abs().amax() * room) if fmt.two_level else None
    now = torch.from_numpy(order).to(device).view(count, group).clone()
    home = None if blocks is None else torch.from_numpy(blocks).to(device)
    generator = torch.Generator().manual_seed(seed)

    def errors(groups: Tensor) -> Tensor:
        x = rows.index_select(1, groups.flatten())
        x = rotate(x, rotation)
        lost = (fake_quantize(x, fmt, global_scale=scale, clip=ratio) - x).square()
        energy = weight_energy[groups]
        if rotation:
            return lost.sum(dim=0).view_as(groups).sum(dim=1) * energy.mean(dim=1)
        return (lost.sum(dim=0).view_as(groups) * energy).sum(dim=1)

    current = errors(now)
    half = count // 2
    for _ in range(steps):
        pairs = torch.randperm(count, generator=generator)[: 2 * half].to(device)
        places = torch.randint(group, (2 * half,), generator=generator).to(device)
        a, b = pairs[:half], pairs[half:]
        first, second = now[a, places[:half]], now[b, places[half:]]
        tried = now[pairs]
        index = torch.arange(half, device=device)
        tried[index, places[:half]], tried[half + index, places[half:]] = second, first
        new = errors(tried)
        better = new[:half] + new[half:] < current[a] + current[b]
        if home is not None:
            better &= home[first] == home[second]
        both = torch.cat([better, better])
        now[pairs] = torch.where(both[:, None], tried, now[pairs])
        current[pairs] = torch.where(both, new, current[pairs])
    return now.flatten().cpu().numpy()


def _can_cross(groups: np.ndarray) -> bool:
    """Whether any block has columns in two groups."""
    owners: dict[int, int] = {}
    for index, members in enumerate(groups):
        for block in np.unique(members):
            if owners.setdefault(int(block), index) != index:
                return True
    return False


def homes(blocks: np.ndarray) -> np.ndarray:
    """Blocks by column (int64 [K]), where every column that may not move is a block of its own."""
    homes = blocks.copy()
    fixed = np.flatnonzero(blocks < 0)
    homes[fixed] = blocks.max(initial=-1) + 1 + np.arange(fixed.size)
    return homes
