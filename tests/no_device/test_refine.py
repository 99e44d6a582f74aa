"""Swaps between groups: they only ever lower the error that numpy computes, and stay in their blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pq_fx.kernels.formats import get_format
from pq_fx.passes.refine import refine

K, GROUP = 96, 16


def rows(seed: int, channels: int = K) -> torch.Tensor:
    """Channels in bursts: which of them are large changes from row to row."""
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(6, (300,), generator=g)
    owner = torch.randint(6, (channels,), generator=g)
    return torch.randn(300, channels, generator=g) * torch.where(owner == which[:, None], 8.0, 1.0)


def lost(x: np.ndarray, order: np.ndarray, rotation: int) -> float:
    """Squared error of int4 with exact fp64 scales, after the block rotation."""
    x = x[:, order].reshape(len(x), -1, GROUP)
    if rotation:
        h = np.ones((1, 1))
        while len(h) < rotation:
            h = np.block([[h, h], [h, -h]])
        x = (x.reshape(len(x), -1, rotation) @ h / np.sqrt(rotation)).reshape(x.shape)
    scale = np.abs(x).max(-1, keepdims=True) / 7
    return float(((np.rint(x / scale).clip(-7, 7) * scale - x) ** 2).sum())


@pytest.mark.parametrize("rotation", [0, 8, 16])
def test_swaps_lower_the_error(rotation: int) -> None:
    x, fmt = rows(rotation), get_format("int4", GROUP)
    start = np.random.default_rng(rotation).permutation(K)
    given = {"rotation": rotation, "clip": 1.0, "steps": 120}
    order = refine(x, torch.ones(K), start, None, fmt, **given)
    assert sorted(order) == list(range(K)) and not np.array_equal(order, start)
    before, after = (lost(x.double().numpy(), o, rotation) for o in (start, order))
    assert after < (0.85 if rotation == 0 else 0.98) * before
    again = refine(x, torch.ones(K), start, None, fmt, **given)
    assert np.array_equal(order, again)  # deterministic
    # On rows that no swap was tried on, too.
    other = rows(rotation)[torch.randperm(300)] + 0.1 * torch.randn(300, K)
    assert lost(other.double().numpy(), order, rotation) < lost(
        other.double().numpy(), start, rotation
    )


def test_channels_stay_in_their_blocks() -> None:
    x, fmt = rows(3), get_format("int4", GROUP)
    blocks = np.arange(K) // 48  # three groups each
    start = np.arange(K)
    order = refine(x, torch.ones(K), start, blocks, fmt, rotation=0, clip=1.0, steps=60)
    assert not np.array_equal(order, start)
    assert (blocks[order] == blocks).all()
    # Blocks as large as a group leave nothing to do, and neither does one group.
    fixed = refine(x, torch.ones(K), start, start // GROUP, fmt, rotation=0, clip=1.0, steps=60)
    assert fixed is start
    one = get_format("fp8")
    assert refine(x, torch.ones(K), start, None, one, rotation=0, clip=1.0, steps=9) is start


def test_a_weight_that_reads_nothing_leaves_the_order() -> None:
    x, fmt = rows(4), get_format("nvfp4")
    start = np.arange(K)
    order = refine(x, torch.zeros(K), start, None, fmt, rotation=0, clip=1.0, steps=40)
    assert np.array_equal(order, start)
