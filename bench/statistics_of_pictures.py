"""Bootstrap intervals over pictures, and distances between pictures, for the fidelity benches."""

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


def structural_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM over three scales (Wang et al. 2003, uniform 7x7 windows), fp64 [n]; pictures
    [n, 3, H, W] in 0..1."""
    a, b = a.double(), b.double()
    mean = torch.nn.functional.avg_pool2d
    scores = []
    for _ in range(3):
        ma, mb = mean(a, 7, 1), mean(b, 7, 1)
        va, vb = mean(a * a, 7, 1) - ma * ma, mean(b * b, 7, 1) - mb * mb
        cov = mean(a * b, 7, 1) - ma * mb
        ssim = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)) / (
            (ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4)
        )
        scores.append(ssim.flatten(1).mean(1))
        a, b = mean(a, 2), mean(b, 2)
    return 1.0 - torch.stack(scores).mean(0)
