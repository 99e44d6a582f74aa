"""Bootstrap intervals over pictures, for the fidelity benches."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 4000


def bootstrap(values: Tensor, *, median: bool = False, seed: int = 0) -> list[float]:
    """[estimate, low, high]: mean or median of fp64 [n] with its 95 % percentile interval.

    Resampled are pictures, so values of two methods on one picture stay together when their
    difference is given.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    drawn = values.double()[picks]
    spread = (drawn.median(1).values if median else drawn.mean(1)).sort().values
    middle = values.double().median() if median else values.double().mean()
    low, high = spread[int(0.025 * RESAMPLES)], spread[int(0.975 * RESAMPLES) - 1]
    return [round(float(v), 6) for v in (middle, low, high)]


def ratio_bootstrap(a: Tensor, b: Tensor, seed: int = 0) -> list[float]:
    """[mean(b) / mean(a) - 1, low, high], paired over pictures; fp64 [n] each."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(a), (RESAMPLES, len(a)), generator=generator)
    spread = (b.double()[picks].mean(1) / a.double()[picks].mean(1) - 1).sort().values
    low, high = spread[int(0.025 * RESAMPLES)], spread[int(0.975 * RESAMPLES) - 1]
    return [round(float(v), 5) for v in (b.mean() / a.mean() - 1, low, high)]
