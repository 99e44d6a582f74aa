"""Balancing: a tensor without its channels' means, and with each channel as large as the weights that read it.

    before   y = Q(x R) Q(W R)^T + b
    after    y = Q((x - m) / s R) Q(W s R)^T + (b + W m)        m_k = E[x_k]
                                                                s_k = (rms(x_k - m_k) / rms(W[:, k]))^(a / 2)

Under a rotation R every channel of a group gets the group's mean energy, and the output error of a
group is the product of its activations' and its weights' energies, sum(x_k^2) sum(w_k^2). By Cauchy
and Schwarz that product is at least sum(|x_k w_k|)^2, reached where x_k / s_k and w_k s_k are alike:
a = 1. SmoothQuant's scale (passes/smooth.py) is made from largest magnitudes, for a quantizer without
rotation. The mean carries no information between rows, but takes steps of the group's scale.

Both cost nothing at run time where what produces the tensor takes them over (passes/scales.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pq_fx.passes.candidates import rotation_size
from pq_fx.passes.choice import OwnSettings, settings_of
from pq_fx.passes.evaluate import Errors, PointErrors, Slot, least
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import Point
from pq_fx.passes.sampled import Measured, check, halves, measured
from pq_fx.passes.turned import Matrix, column_norms

EXPONENTS = (0.5, 1.0)
# Channels smaller than this part of the largest count as this large: no factor beyond its square root.
_FLOOR = 1e-3


class Balance(NamedTuple):
    """A point's scale s and center m, fp32 [K], and held-out errors without them by weight name."""

    scale: Tensor
    center: Tensor
    before: dict[str, float]


def balance(
    point: Point,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Matrix],
    settings: OwnSettings,
    *,
    scale: bool,
    center: bool,
) -> Balance | None:
    """The scale and center with the least output error, or None where neither helps.

    `scale` and `center` say what may differ from 1 and 0. Fitted on one half of the sampled rows and
    accepted on the other. Raises CalibrationError as `choose` does.
    """
    own = settings_of(settings, point.linears[0])
    if own.activation is None or point.one_row or not (scale or center):
        return None
    check(point, moments, weights)
    fit, held = halves(point, moments)
    if len(fit) == 0 or len(held) == 0:
        return None
    device = weights[point.linears[0]].device
    rows, fitted = measured(fit, held, own, device)
    fit = fit.to(device, torch.float32)
    squares = sum(column_norms(weights[n]).square() for n in point.linears)
    assert isinstance(squares, Tensor)
    energy = (squares / sum(len(weights[n]) for n in point.linears)).sqrt()
    groups = (own.activation.group_size, own.weight.group_size)
    rotations = (0, rotation_size(point.channels, groups)) if own.rotate else (0,)
    zero = torch.zeros_like(energy)
    slot = Slot()  # one for all candidates: outputs of the wide linears are large

    def errors(s: Tensor, m: Tensor) -> Errors:
        # Candidates of order and clip ratio come later: what is compared here is cheap.
        sample = Measured((rows - m) / s, fitted)
        measure = PointErrors(
            lambda: sample, point.linears, weights, settings, scale=s, center=m / s, slot=slot
        )
        return min((measure(None, r) for r in rotations), key=lambda e: sum(e.fit.values()))

    plain = errors(torch.ones_like(energy), zero)
    m = fit.mean(dim=0) if center else zero
    size = _floored((fit - m).square().mean(dim=0).sqrt()) / _floored(energy)

    def candidates() -> Iterator[tuple[Balance, Errors]]:
        for exponent in (0.0, *EXPONENTS) if scale else (0.0,):
            s = size.pow(exponent / 2)
            # Of equal balance the factors 1 / s that are at least 1: 1 + scale stays far from cancelling.
            s = s / s.amax()
            yield Balance(s, m, plain.held), errors(s, m)

    return least(plain, candidates())


def _floored(magnitude: Tensor) -> Tensor:
    return magnitude.clamp(min=float(magnitude.amax().clamp(min=1e-30)) * _FLOOR)
