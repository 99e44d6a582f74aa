"""Rounding weights so that later roundings make up for the errors of earlier ones (GPTQ).

Round-to-nearest makes every weight as exact as it can be; what counts is the output. With the
sampled rows X as the linear will see them (reordered, rotated, quantized) and H = X^T X + ridge, the
columns are rounded one after the other, and each one's error is spread over the columns that are
still to come, weighted by the inverse of H (Frantar et al., "GPTQ", ICLR 2023, algorithm 1). It
costs nothing at run time.

    moment = second_moment(x_quantized, group=64)   once for all linears of a point
    q = gptq(weight, moment, fmt)                   a `Quantized`, like that of `quantize`

GPTQ needs U, the upper Cholesky factor of H^-1 [K, K]. A sample has fewer rows R than a wide linear
has channels, so U is never made (at K = 15,360 it alone takes 0.9 GiB): for a block b of columns and
the columns c that follow it, by Woodbury's identity,

    M = (ridge + X_c X_c^T)^-1                      [R, R]
    V V^T = 1 + X_b^T M X_b                         [128, 128], V upper triangular
    U_bb = V^-1 / sqrt(ridge)
    U_bc = -U_bb X_b^T M X_c                        = A_b X_c, with A_b [128, R]

A block's own M comes from that of the block behind it: M - Z Z^T, with Z = M X_b V^-T = -sqrt(ridge) A_b^T.
What all earlier errors E add to a later block is (sum E_b A_b) X_c, a running sum [N, R].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_fx.errors import CalibrationError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import Quantized, at_scales, group_scales, nvfp4_global_scale
from pq_fx.kernels.values import element_values, scale_values
from pq_fx.passes.turned import Columns, column_squares, exact_matmul

# Columns whose errors are collected before they are spread over the rest of the matrix.
_BLOCK = 128
# Blocks whose columns are made together: making them costs as many launches whatever their number.
_MADE = 4
# Elements that are tried at once in a search of scales: enough for a GPU, 8 MiB in fp32, of which there are two.
_SEARCHED = 1 << 21


@dataclass(frozen=True)
class SecondMoment:
    """What the rows of a point tell about how errors of its channels combine.

    Attributes:
        order: int64 [K], the channels in the order of rounding: group by group, large ones first.
        rows: fp32 [r, K], r <= R: columns in that order, X^T X their second moment.
        within: of each block of columns, fp32 [b, b]: U_bb, each row divided by its diagonal element.
        beyond: of each block, fp32 [b, r]: A_b, likewise; on the CPU, since together they are as large as the rows.
        cost: fp32 [K], what a squared error of a channel costs: 1 / diag(U)^2.
        group: channels that share a scale (and stay together in `order`).
    """

    order: Tensor
    rows: Tensor
    within: list[Tensor]
    beyond: list[Tensor]
    cost: Tensor
    group: int


def second_moment(
    quantized: Tensor, *, group: int, ridge: float = 0.1, by_size: bool = True
) -> SecondMoment:
    """Prepare `gptq` from rows.

    Args:
        quantized: [R, K] rows as the linear sees them (after order, rotation and quantization).
        group: group size of the weights' format, 0 = a row.
        ridge: above 0, added to the diagonal of H, as a part of its mean. GPTQ's 0.01 is for more
            rows than a reservoir holds: on prompts and timesteps that were not calibrated, 0.1 has
            less error, be it with 1,024 or 4,096 rows.
        by_size: round groups, and channels inside a group, from the largest second moment down.

    Raises:
        CalibrationError: rows are missing or not finite.
    """
    count, channels = quantized.shape
    x = quantized.float()
    if count == 0 or not bool(torch.isfinite(x).all()):
        raise CalibrationError(
            f"{count} rows to round weights by, some not finite; calibrate again"
        )
    del quantized  # nothing else holds the rows of a conversion, as large as what is made of them
    size = column_squares(x)
    order = _order(size, group or channels, by_size)
    # Relative to the mean: the unit of H cancels.
    x = x[:, order].mul_(size.mean().clamp(min=torch.finfo(torch.float32).tiny).rsqrt())
    with exact_matmul():
        if count > channels:
            x = torch.linalg.qr(x.double(), mode="r").R.float()
        # From the last block to the first: each needs the inverse for what follows it.
        inverse = torch.eye(len(x), dtype=torch.float64, device=x.device) / ridge
        within, beyond, diagonals = [], [], []
        for part in reversed(x.split(_columns(group or channels), dim=1)):
            u, a = _factor(part.double(), inverse, ridge)
            diagonal = u.diagonal()
            # Solvers answer column by column; the loop over columns and the products read rows.
            within.append((u / diagonal[:, None]).float().contiguous())
            beyond.append((a / diagonal[:, None]).float().contiguous().cpu())
            diagonals.append(diagonal)
    cost = torch.cat(diagonals[::-1]).square().reciprocal().float()
    # Asked once for all blocks: a GPU stops for an answer.
    if not bool(torch.isfinite(cost).all()):
        raise CalibrationError("the second moment of the rows is not positive; calibrate again")
    return SecondMoment(order, x.contiguous(), within[::-1], beyond[::-1], cost, group or channels)


def holds_groups(group: int) -> bool:
    """Whether a block of columns holds whole groups (group 0 is a row)."""
    return 0 < group <= _BLOCK


def _columns(group: int) -> int:
    """Columns of a block: whole groups, or a part of one that is larger."""
    return _BLOCK // group * group if group <= _BLOCK else _BLOCK


def _factor(x: Tensor, inverse: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """U_bb and A_b of a block x fp64 [r, b]; `inverse` fp64 [r, r] is M, and becomes that of the block before."""
    mx = inverse @ x
    inner = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).addmm_(x.T, mx)
    # V from the last row up is the lower factor of the matrix read backwards.
    v = torch.linalg.cholesky_ex(inner.flip(0, 1)).L.flip(0, 1)
    z = torch.linalg.solve_triangular(v, mx.T, upper=True)
    inverse.addmm_(z.T, z, alpha=-1)
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    u = torch.linalg.solve_triangular(v, one, upper=True)
    return u * ridge**-0.5, z * -(ridge**-0.5)


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


def gptq(
    weight: Tensor | Columns,
    moment: SecondMoment,
    fmt: Format,
    *,
    global_scale: Tensor | None = None,
    scale_search: Sequence[float] = (),
    columns: Callable[..., None] | None = None,
) -> Quantized:
    """Round `weight` float [N, K] (in the order and rotation of the rows) to `fmt`.

    `global_scale` as in `quantize`; None for nvfp4 takes the weight's own, which has to be a tensor
    then. `scale_search`: ratios of the largest magnitude that are tried for each group's scale; the
    least error, weighted by what each channel's error costs, wins. `columns` does what
    `round_columns` does, which is for a CPU. Returns what `quantize` returns, fp32 arithmetic.

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
    if fmt.two_level and global_scale is None:
        assert isinstance(weight, Tensor)
        global_scale = nvfp4_global_scale(weight.abs().amax())
    with exact_matmul():
        codes, scale = _round(
            weight, moment, fmt, global_scale, scale_search, columns or round_columns
        )
    groups = (moment.order[::group] // group).argsort()
    return Quantized(codes, scale[:, groups], global_scale)


def _round(
    weight: Tensor | Columns,
    moment: SecondMoment,
    fmt: Format,
    global_scale: Tensor | None,
    scale_search: Sequence[float],
    round_some: Callable[..., None],
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] and scales [N, K / group], the latter's groups in the order of rounding."""
    values, bounds, points = _elements(fmt, weight.device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales: list[Tensor] = []
    ratios = torch.tensor(scale_search or (1.0,), device=weight.device)
    spread = torch.zeros(weight.shape[0], len(moment.rows), device=weight.device)

    def made(start: int, end: int) -> Tensor:  # fp32 [end - start, N]
        index = moment.order[start:end]
        found = weight[:, index] if isinstance(weight, Tensor) else weight.columns(index)
        return found.float().T.contiguous()

    def current(columns: Tensor, start: int) -> Tensor:
        """Columns [b, N] from `start` on as earlier errors leave them."""
        rows = moment.rows[:, start : start + len(columns)]
        return torch.addmm(columns, rows.T, spread.T, alpha=-1)

    start = ahead = 0
    factor = spread.new_ones(weight.shape[0])
    for i, (within, beyond) in enumerate(zip(moment.within, moment.beyond, strict=True)):
        end = start + len(within)
        if i % _MADE == 0:
            ahead, several = start, sum(len(w) for w in moment.within[i : i + _MADE])
            columns = made(start, start + several)
        block = current(columns[start - ahead : end - ahead], start)
        errors, index = torch.empty_like(block), torch.empty_like(block, dtype=torch.int32)
        # Columns of one group have one scale, and their errors reach the others together.
        for first in range(0, len(block), moment.group):
            last = min(first + moment.group, len(block))
            if (start + first) % moment.group == 0:
                stop = start + first + moment.group
                part = block[first:last] if stop <= end else current(made(start, stop), start)
                cost = moment.cost[start + first : stop]
                stored = _scale(part.T, cost, fmt, global_scale, ratios)
                scales.append(stored)
                factor = scale_values(stored, fmt, global_scale).squeeze(1)
            some = slice(first, last)
            round_some(
                block[some], within[some, some], factor, values, bounds, index[some], errors[some]
            )
            block[last:].addmm_(within[some, last:].T, errors[some], alpha=-1)
        codes[:, moment.order[start:end]] = points[index.long()].T
        spread.addmm_(errors.T, beyond.to(spread.device))
        start = end
    return codes, torch.cat(scales, dim=1)


def round_columns(
    block: Tensor,
    within: Tensor,
    factor: Tensor,
    values: Tensor,
    bounds: Tensor,
    index: Tensor,
    errors: Tensor,
) -> None:
    """Round columns of one scale one after the other, each one's error spread over those that follow.

    Args:
        block: fp32 [b, N], a column a row; overwritten.
        within: fp32 [b, b], above the diagonal the share of a column's error that a later one takes.
        factor: fp32 [N], scales.
        values: fp32 [v], an element's values in rising order; `bounds` fp32 [v - 1] between them.
        index: int32 [b, N], set to the indices in `values`.
        errors: fp32 [b, N], set to what the rounding of each column lost.
    """
    # A scale of zero (mxfp4's smallest, flushed) holds zeros only.
    divisor = factor.where(factor != 0, torch.ones_like(factor))
    for j, now in enumerate(block):
        torch.bucketize(now / divisor, bounds, out_int32=True, out=index[j])
        torch.addcmul(now, values.index_select(0, index[j]), factor, value=-1, out=errors[j])
        block[j + 1 :].addr_(within[j, j + 1 :], errors[j], alpha=-1)


def _scale(
    part: Tensor,
    cost: Tensor,
    fmt: Format,
    global_scale: Tensor | None,
    ratios: Tensor,
) -> Tensor:
    """Stored scales [N, 1] of one group [N, g], by the ratio with the least weighted error."""
    # All ratios at once: a GPU is kept busy by one launch instead of sixteen.
    clip = ratios.view(-1, 1, 1, 1)
    step = max(1, _SEARCHED // (len(ratios) * part.shape[1]))
    # These rules compare errors of elements, the others take one number a group.
    pieces = part.split(step if fmt.scale in ("pow2", "4over6") else len(part))
    scales = [
        group_scales(p.expand(len(ratios), *p.shape), fmt, global_scale, clip) for p in pieces
    ]
    scale = torch.cat(scales, dim=1)
    errors = []
    for some, own in zip(part.split(step), scale.split(step, dim=1), strict=True):
        value = at_scales(some.expand(len(ratios), *some.shape), own, fmt, global_scale)
        errors.append(value.sub_(some).square_() @ cost)
    best = torch.cat(errors, dim=1).min(dim=0).indices  # [N]; of equals any
    return scale[best, torch.arange(len(part), device=part.device)]


def _elements(fmt: Format, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """An element's values in rising order, the bounds between them, and their code points."""
    points = torch.arange(1 << fmt.bits, dtype=torch.int32, device=device).to(torch.uint8)
    values = element_values(points, fmt)
    # No NaN code points, no negative zeros, and nothing beyond max_value (int8's -128).
    kept = (values.abs() <= fmt.max_value) & ~((values == 0) & values.signbit())
    values, index = values[kept].sort()
    return values, (values[1:] + values[:-1]) / 2, points[kept][index]
