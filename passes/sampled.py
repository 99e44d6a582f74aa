"""The sampled rows of a point: one half to fit on, one to accept on, and what choosing reads from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pq_fx.errors import CalibrationError
from pq_fx.passes.choice import Settings
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import Point
from pq_fx.passes.turned import Matrix, column_norms, column_squares, pieces


class Measured(NamedTuple):
    """Sampled rows of a point, float [n, K] as they are stored, the first `fitted` of which are for fitting."""

    rows: Tensor
    fitted: int


def halves(point: Point, moments: Mapping[str, Moments]) -> tuple[Tensor, Tensor]:
    """Sampled rows for fitting and for acceptance, none in both, where and as they are stored."""
    # Keys are random, so that every other row in their order is a random half.
    rows = moments[point.name].sample()
    return rows[0::2], rows[1::2]


def check(point: Point, moments: Mapping[str, Moments], weights: Mapping[str, Matrix]) -> None:
    """Raise CalibrationError unless the point was seen, and rows and weights are finite."""
    if point.name not in moments:
        raise CalibrationError(f"{point.name}: no statistics; calibrate the model first")
    moments[point.name].check(point.name)
    for name in point.linears:
        ends = [torch.stack(torch.aminmax(piece)) for piece in pieces(weights[name])]
        if not bool(torch.isfinite(torch.stack(ends)).all()):
            raise CalibrationError(f"{name}: the weight holds NaN or infinity; skip it by a rule")


def measured(fit: Tensor, held: Tensor, settings: Settings, device: torch.device) -> Measured:
    """The rows of `halves` that errors are measured on, on `device`."""
    fit, held = fit[: settings.fit_rows], held[: settings.held_rows]
    return Measured(torch.cat([fit, held]).to(device), len(fit))


def second_moments(
    point: Point, rows: Tensor, weights: Mapping[str, Matrix]
) -> tuple[np.ndarray, np.ndarray]:
    """E[x_i^2] and mean_n W[n, i]^2 over all rows of all linears, float64 [K]."""
    sums, count = torch.zeros(point.channels, dtype=torch.float64), 0
    for name in point.linears:
        weight = weights[name]
        norm = column_norms(weight).double()
        sums, count = sums.to(weight.device) + norm.square(), count + len(weight)
    wide = rows.to(sums.device, torch.float32)
    seen = (column_squares(wide) / len(wide)).double()
    return seen.cpu().numpy(), (sums / count).cpu().numpy()
