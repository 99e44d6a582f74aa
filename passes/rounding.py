"""Rounding weights so that later roundings make up for the errors of earlier ones (GPTQ).

Round-to-nearest makes every weight as exact as it can be; what counts is the output. With the
sampled rows X_q as the linear will see them (reordered, rotated, quantized) and H = X_q^T X_q, the
columns are rounded one after the other, and each one's error is spread over the columns that are
still to come, weighted by the inverse of H (Frantar et al., "GPTQ", ICLR 2023, algorithm 1). It
costs nothing at run time.

    moment = second_moment(x_quantized, group=64)   once for all linears of a point
    q = gptq(weight, moment, fmt)                   a `Quantized`, like that of `quantize`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_fx.errors import CalibrationError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import Quantized, nvfp4_global_scale, quantize
from pq_fx.kernels.values import element_values, scale_values
from pq_fx.passes.evaluate import exact_matmul

# Columns whose errors are collected before they are spread over the rest of the matrix.
_BLOCK = 128
# The ridge grows by this factor until the matrix can be inverted in fp32.
_GROWTH = 10.0
_TRIES = 6


@dataclass(frozen=True)
class SecondMoment:
    """What the rows of a point tell about how errors of its channels combine.

    Attributes:
        order: int64 [K], the channels in the order of rounding: group by group, large ones first.
        spread: fp32 [K, K], the upper Cholesky factor of the inverse of H + ridge, in that order.
        group: channels that share a scale (and stay together in `order`).
    """

    order: Tensor
    spread: Tensor
    group: int


def second_moment(
    quantized: Tensor, *, group: int, ridge: float = 0.1, by_size: bool = True
) -> SecondMoment:
    """Prepare `gptq` from rows.

    Args:
        quantized: [R, K] rows as the linear sees them (after order, rotation and quantization).
        group: group size of the weights' format, 0 = a row.
        ridge: added to the diagonal of H, as a part of its mean. GPTQ's 0.01 is for more rows
            than a reservoir holds: on prompts and timesteps that were not calibrated, 0.1 has
            less error, be it with 1,024 or 4,096 rows.
        by_size: round groups, and channels inside a group, from the largest second moment down.

    Raises:
        CalibrationError: rows are missing or not finite, or H cannot be inverted.
    """
    rows, channels = quantized.shape
    x = quantized.float()
    if rows == 0 or not bool(torch.isfinite(x).all()):
        raise CalibrationError(f"{rows} rows to round weights by, some not finite; calibrate again")
    with exact_matmul():
        h = x.T @ x / rows
        mean = h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        order = _order(h.diagonal(), group or channels, by_size)
        h = h[order][:, order]
        spread = torch.linalg.cholesky(
            torch.cholesky_inverse(_cholesky(h, mean * ridge)), upper=True
        )
    return SecondMoment(order, spread, group or channels)


def _order(size: Tensor, group: int, by_size: bool) -> Tensor:
    """Channels in the order of rounding, int64 [K]; groups stay together, so scales can follow."""
    if not by_size:
        return torch.arange(size.numel(), device=size.device)
    groups = size.unflatten(0, (-1, group))
    inside = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.sum(dim=1).argsort(descending=True, stable=True)
    return (inside + group * torch.arange(len(groups), device=size.device)[:, None])[
        first
    ].flatten()


def _cholesky(h: Tensor, ridge: Tensor) -> Tensor:
    """Lower Cholesky factor of h + ridge; the ridge grows where rounding made h indefinite."""
    for _ in range(_TRIES):
        factor, info = torch.linalg.cholesky_ex(h + torch.diag(ridge.expand(len(h))))
        if int(info) == 0:
            return factor
        ridge = ridge * _GROWTH
    raise CalibrationError(
        f"the second moment of {len(h)} channels cannot be inverted; are the activations finite "
        "and scaled sanely? Use rounding='nearest' for this layer"
    )


def gptq(
    weight: Tensor,
    moment: SecondMoment,
    fmt: Format,
    *,
    global_scale: Tensor | None = None,
    scale_search: Sequence[float] = (),
) -> Quantized:
    """Round `weight` float [N, K] (in the order and rotation of the rows) to `fmt`.

    `global_scale` as in `quantize`; None for nvfp4 takes the weight's own. `scale_search`: ratios
    of the largest magnitude that are tried for each group's scale; the least error, weighted by
    what each channel's error costs, wins. Returns what `quantize` returns, fp32 arithmetic.

    Raises:
        FormatError: K is not a multiple of the format's group.
        CalibrationError: `moment` was prepared for another K or group.
    """
    channels = weight.shape[1]
    fmt.check_channels(channels)
    group = fmt.group_size or channels
    if moment.order.numel() != channels or moment.group != group:
        raise CalibrationError(
            f"expected rows of {channels} channels in groups of {group}, found "
            f"{moment.order.numel()} in groups of {moment.group}"
        )
    w = weight.float()
    if fmt.two_level and global_scale is None:
        global_scale = nvfp4_global_scale(w.abs().amax())
    with exact_matmul():
        codes, scale = _round(w[:, moment.order], moment, fmt, group, global_scale, scale_search)
    back = moment.order.argsort()
    groups = (moment.order[::group] // group).argsort()
    return Quantized(codes[:, back], scale[:, groups], global_scale)


def _round(
    w: Tensor,
    moment: SecondMoment,
    fmt: Format,
    group: int,
    global_scale: Tensor | None,
    ratios: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] and scales [N, K / group], columns in the order of rounding."""
    spread, channels = moment.spread, w.shape[1]
    values, bounds, points = _elements(fmt, w.device)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales: list[Tensor] = []
    factor = w.new_ones(len(w))
    for start in range(0, channels, _BLOCK):
        end = min(start + _BLOCK, channels)
        block = w[:, start:end]
        errors = torch.zeros_like(block)
        for j in range(end - start):
            column = start + j
            if column % group == 0:
                part = w[:, column : column + group]
                cost = spread.diagonal()[column : column + group].square().reciprocal()
                stored = _scale(part, cost, fmt, global_scale, ratios)
                scales.append(stored)
                factor = scale_values(stored, fmt, global_scale).squeeze(1)
                # A scale of zero (mxfp4's smallest, flushed) holds zeros only.
                divisor = factor.where(factor > 0, torch.ones_like(factor))
            now = block[:, j]
            index = torch.bucketize(now / divisor, bounds)
            codes[:, column] = points[index]
            error = (now - values[index] * factor) / spread[column, column]
            errors[:, j] = error
            if j + 1 < end - start:
                block[:, j + 1 :].addr_(error, spread[column, column + 1 : end], alpha=-1)
        w[:, end:].addmm_(errors, spread[start:end, end:], alpha=-1)
    return codes, torch.cat(scales, dim=1)


def _scale(
    part: Tensor,
    cost: Tensor,
    fmt: Format,
    global_scale: Tensor | None,
    ratios: Sequence[float],
) -> Tensor:
    """Stored scales [N, 1] of one group [N, g], by the ratio with the least weighted error."""
    if len(ratios) < 2:
        return quantize(part, fmt, global_scale=global_scale, scale_search=ratios).scale
    # All ratios at once: a GPU is kept busy by one launch instead of sixteen.
    clip = torch.tensor(ratios, device=part.device).view(-1, 1, 1, 1)
    many = part.expand(len(ratios), *part.shape)
    q = quantize(many, fmt, global_scale=global_scale, clip=clip)
    value = element_values(q.codes, fmt) * scale_values(q.scale, fmt, global_scale)
    error = ((value - part).square() * cost).sum(dim=2)
    best = error.min(dim=0).indices  # [N]; of equals any
    rows = torch.arange(len(part), device=part.device)
    return q.scale.view(q.scale.shape[:2])[best, rows].unsqueeze(1)


def _elements(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """An element's values in rising order, the bounds between them, and their code points."""
    points = torch.arange(1 << fmt.bits, dtype=torch.int32, device=device).to(torch.uint8)
    values = element_values(points, fmt)
    # No NaN code points, no negative zeros, and nothing beyond max_value (int8's -128).
    kept = (values.abs() <= fmt.max_value) & ~((values == 0) & values.signbit())
    values, index = values[kept].sort()
    return values, (values[1:] + values[:-1]) / 2, points[kept][index]
