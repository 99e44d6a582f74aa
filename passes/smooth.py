"""Smoothing: magnitude moves from a tensor's channels to the columns of the weights that read it.

    before   y = Q(x) Q(W)^T
    after    y = Q(x / s) Q(W s)^T        s_k = max|x_k|^a / max_n|W[n, k]|^(1 - a)

(SmoothQuant, arXiv 2211.10438, equation 4.) The exponent a is searched for each point by the true
output error on sampled rows; s = 1 stays where nothing is better. 1 / s is folded into what
produces the tensor where that commutes (passes/scales.py), else it is a multiplication in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pq_fx.passes.choice import OwnSettings, settings_of
from pq_fx.passes.evaluate import Errors, PointErrors, Slot, least
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import Point
from pq_fx.passes.sampled import Measured, check, halves, measured
from pq_fx.passes.turned import Matrix, pieces

ALPHAS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
# Channels smaller than this part of the largest count as this large: dead channels get no factor.
_FLOOR = 1e-5


class Smoothing(NamedTuple):
    """A point's scale s fp32 [K], its exponent, and held-out errors without it by weight name."""

    scale: Tensor
    alpha: float
    before: dict[str, float]


def smooth_scale(
    point: Point,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Matrix],
    settings: OwnSettings,
    alphas: tuple[float, ...] = ALPHAS,
) -> Smoothing | None:
    """The scale with the least output error, or None where s = 1 has the least.

    Fitted on one half of the sampled rows and accepted on the other. Raises CalibrationError as
    `choose` does.
    """
    first = settings_of(settings, point.linears[0])
    if first.activation is None or point.one_row:
        return None
    check(point, moments, weights)
    fit, held = halves(point, moments)
    if len(fit) == 0 or len(held) == 0:
        return None
    rows, fitted = measured(fit, held, first, weights[point.linears[0]].device)
    plainly = {  # what a rounding with compensation will do to smoothed weights is not known here
        name: replace(settings_of(settings, name), weight_search=(), weight_part=1.0)
        for name in point.linears
    }
    x = moments[point.name].amax.to(rows)
    largest = [
        piece.abs().amax(dim=0).float() for name in point.linears for piece in pieces(weights[name])
    ]
    slot = Slot()  # one for all candidates: outputs of the wide linears are large
    w = torch.stack(largest).amax(dim=0)

    def errors(s: Tensor) -> Errors:
        sample = Measured(rows / s, fitted)
        return PointErrors(lambda: sample, point.linears, weights, plainly, scale=s, slot=slot)(
            None, 0
        )

    plain = errors(torch.ones_like(x))

    def candidates() -> Iterator[tuple[Smoothing, Errors]]:
        for alpha in alphas:
            s = _power(x, alpha) / _power(w, 1.0 - alpha)
            s = s / s.log().mean().exp()
            yield Smoothing(s, alpha, plain.held), errors(s)

    return least(plain, candidates())


def _power(magnitude: Tensor, exponent: float) -> Tensor:
    top = magnitude.amax().clamp(min=torch.finfo(torch.float32).tiny)
    return (magnitude / top).clamp(min=_FLOOR).pow(exponent)
