"""Distances between pictures, without a network or a model: pixels (PSNR) and local structure (multi-scale SSIM)."""

from __future__ import annotations

import torch
from torch import Tensor

from pq_fx.errors import ConfigError

_WINDOW, _SCALES = 7, 3
SMALLEST = _WINDOW * 2 ** (_SCALES - 1)  # pixels of a side that structural_distance needs


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: [n, ...] in 0..1 twice -> fp64 [n].

    Equal pictures give infinity. Raises ConfigError where the shapes differ.
    """
    _same_shape("psnr", a, b)
    return -10 * (a.double() - b.double()).square().flatten(1).mean(1).log10()


def structural_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM over three scales: [n, 3, height, width] in 0..1 twice -> fp64 [n]; 0 for equal pictures.

    Luminance, contrast and structure of uniform 7x7 windows (Wang, Simoncelli, Bovik, "Multiscale structural
    similarity", 2003). Raises ConfigError where the shapes differ or a side is under 28 pixels.
    """
    _same_shape("structural_distance", a, b)
    if min(a.shape[-2:]) < SMALLEST:
        raise ConfigError(
            f"structural_distance needs sides of at least {SMALLEST} pixels, got {list(a.shape)}"
        )
    a, b = a.double(), b.double()
    mean = torch.nn.functional.avg_pool2d
    scores = []
    for _ in range(_SCALES):
        ma, mb = mean(a, _WINDOW, 1), mean(b, _WINDOW, 1)
        va, vb = mean(a * a, _WINDOW, 1) - ma * ma, mean(b * b, _WINDOW, 1) - mb * mb
        cov = mean(a * b, _WINDOW, 1) - ma * mb
        ssim = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)) / (
            (ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4)
        )
        scores.append(ssim.flatten(1).mean(1))
        a, b = mean(a, 2), mean(b, 2)
    return 1.0 - torch.stack(scores).mean(0)


def _same_shape(what: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ConfigError(f"{what} needs two tensors of one shape, got {a.shape} and {b.shape}")
