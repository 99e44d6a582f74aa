"""Triton: layer or RMS norm, affine, modulation, channel gather, rotation, quantize in one kernel.

A program holds a few rows [K] of one batch entry, so that their modulation is read once; mean and variance are fp32
sums on chip, and so is the gather of a permutation. Defined by `pq_fx.kernels.reference_ops.norm_quantize`; sums have
another order here, so a code may move by one step where a value lies on a boundary (tests/thresholds.py says how many).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.carriers import check_carrier
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import launch
from pq_fx.kernels.quantize_row import quantize_rows_store
from pq_fx.kernels.reference_ops import NORMS, check_choice
from pq_fx.kernels.rotate_row import gather_rows
from pq_fx.kernels.rounding import as_bytes, round_row, widen
from pq_fx.kernels.row_arguments import (
    as_carried,
    channel_vector,
    check_quantize,
    empty_outputs,
    modulation_rows,
    row_constants,
    row_tile,
)
from pq_fx.kernels.rows import (
    MAX_BATCH,
    Tile,
    as_rows,
    ceil_div,
    native_fp8,
    on_device_of,
    require,
    storage_bytes,
)


@triton.jit
def _load_vector(ptr, read, mask, ROWS: tl.constexpr):
    # Of the rows' shape, so that it comes in their layout: a vector would pass through shared memory.
    at = tl.broadcast_to((ptr + read)[None, :], [ROWS, read.shape[0]])
    return widen(tl.load(at, mask=mask[None, :], other=0.0))


@triton.jit
def _affine(
    y,
    read,
    mask,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """``(y * weight + bias) * (1 + scale) + shift`` of y [R, L], each vector read at `read` [L]."""
    ROWS: tl.constexpr = y.shape[0]
    if HAS_WEIGHT:
        y = y * _load_vector(weight_ptr, read, mask, ROWS)
    if HAS_BIAS:
        y = y + _load_vector(bias_ptr, read, mask, ROWS)
    if HAS_SCALE:
        y = y * (_load_vector(scale_ptr, read, mask, ROWS) + 1.0)
    if HAS_SHIFT:
        y = y + _load_vector(shift_ptr, read, mask, ROWS)
    return y


@triton.jit
def _row_sum(head, tail, TAIL: tl.constexpr):
    """Sum [ROWS] over both pieces."""
    total = tl.sum(head, axis=1)
    if TAIL > 0:
        total += tl.sum(tail, axis=1)
    return total


@triton.jit
def _norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mod_scale_ptr,
    mod_shift_ptr,
    perm_ptr,
    global_ptr,
    clip_ptr,
    data_ptr,
    scale_ptr,
    TOKENS,
    eps,
    x_outer_stride,
    x_stride,
    mod_scale_stride,
    mod_shift_stride,
    CHANNELS: tl.constexpr,
    RMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_PERM: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    BY_DOT: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    GAIN: tl.constexpr,
    CARRIER: tl.constexpr,
    UNIT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """x [B, TOKENS, CHANNELS]; weight, bias [CHANNELS]; mod_* one row a batch entry.

    Program (i, b) holds ROWS tokens of batch entry b, and their modulation once. data uint8
    [B * TOKENS, CHANNELS]; scale [M, CHANNELS / GROUP] in its storage dtype, or fp32 [M].
    """
    eps = tl.cast(eps, tl.float32)  # Inductor passes floats in double
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = token < TOKENS
    # Rows that do not exist read the last one and are not stored: no mask on the wide loads.
    token = tl.minimum(token, TOKENS - 1).to(tl.int64)
    rows = x_ptr + batch * x_outer_stride + token * x_stride
    if HAS_SCALE:
        mod_scale_ptr += batch * mod_scale_stride
    if HAS_SHIFT:
        mod_shift_ptr += batch * mod_shift_stride
    at = tl.arange(0, HEAD)
    inside = at < CHANNELS
    x = widen(tl.load(rows[:, None] + at[None, :], mask=inside[None, :], other=0.0))
    tail = x
    if TAIL > 0:
        tail_at = HEAD + tl.arange(0, TAIL)
        tail_inside = tail_at < CHANNELS
        tail = widen(
            tl.load(rows[:, None] + tail_at[None, :], mask=tail_inside[None, :], other=0.0)
        )
    mean = tl.zeros([ROWS], tl.float32)
    if not RMS:
        mean = _row_sum(x, tail, TAIL) / CHANNELS
        x -= mean[:, None]
        tail -= mean[:, None]
        if HEAD > CHANNELS:
            x = tl.where(inside[None, :], x, 0.0)
        if TAIL > 0 and HEAD + TAIL > CHANNELS:
            tail = tl.where(tail_inside[None, :], tail, 0.0)
    square = _row_sum(x * x, tail * tail, TAIL)
    inverse_deviation = 1.0 / tl.sqrt(square / CHANNELS + eps)
    y = _affine(
        x * inverse_deviation[:, None],
        at,
        inside,
        weight_ptr,
        bias_ptr,
        mod_scale_ptr,
        mod_shift_ptr,
        HAS_WEIGHT,
        HAS_BIAS,
        HAS_SCALE,
        HAS_SHIFT,
    )
    if HEAD > CHANNELS:
        y = tl.where(inside[None, :], y, 0.0)
    y = round_row(y, x_ptr.dtype.element_ty)
    tail_y = y
    if TAIL > 0:
        tail_y = _affine(
            tail * inverse_deviation[:, None],
            tail_at,
            tail_inside,
            weight_ptr,
            bias_ptr,
            mod_scale_ptr,
            mod_shift_ptr,
            HAS_WEIGHT,
            HAS_BIAS,
            HAS_SCALE,
            HAS_SHIFT,
        )
        if HEAD + TAIL > CHANNELS:
            tail_y = tl.where(tail_inside[None, :], tail_y, 0.0)
        tail_y = round_row(tail_y, x_ptr.dtype.element_ty)
    if HAS_PERM:
        y, tail_y = gather_rows(y, tail_y, perm_ptr, CHANNELS, HEAD, TAIL, BY_DOT)
    quantize_rows_store(
        y,
        tail_y,
        as_bytes(data_ptr),
        scale_ptr,
        global_ptr,
        clip_ptr,
        batch * TOKENS + token,
        live,
        HAS_GLOBAL,
        HAS_CLIP,
        CHANNELS,
        ROWS,
        HEAD,
        TAIL,
        GROUP,
        ROTATION,
        BY_DOT,
        ELEMENT,
        SCALE,
        TOP,
        GAIN,
        CARRIER,
        UNIT,
        NATIVE_FP8,
    )


def norm_quantize(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch norm, modulation, gather, rotate, quantize (see `reference_ops.norm_quantize`).

    tile: how programs hold rows, for measurements.

    Raises:
        KernelError: shapes, dtypes or devices do not fit.
        FormatError: K does not fit the format or the rotation.
    """
    check_choice("norm", norm, NORMS)
    fmt = Format.parse(format)
    check_carrier(carrier, fmt)
    channels = x.shape[-1]
    check_quantize(x, channels, perm, global_scale, clip, fmt, rotation)
    stored, scale = empty_outputs(x, channels, fmt, carrier)
    if x.numel() == 0:
        return as_carried(stored, carrier), scale
    scales = modulation_rows(mod_scale, x, "mod_scale")
    shifts = modulation_rows(mod_shift, x, "mod_shift")
    # A row of modulation serves all tokens of a batch entry; rows [B, K] are entries of one token.
    by_entry = scales.stride + shifts.stride > 0
    require(
        not by_entry or x.shape[0] <= MAX_BATCH,
        f"{x.shape[0]} batch entries with a modulation each; a launch takes {MAX_BATCH}: split the batch",
    )
    rows = as_rows(x.unsqueeze(1) if x.dim() == 2 and by_entry else x, "x")
    tile = tile or row_tile(channels, fmt, rotation, x.dtype, perm is not None)
    with on_device_of(x):
        launch(_norm_quantize_kernel)[(ceil_div(rows.tokens, tile.rows), rows.batch)](
            rows.tensor,
            channel_vector(weight, x, "weight"),
            channel_vector(bias, x, "bias"),
            scales.tensor,
            shifts.tensor,
            perm,
            global_scale,
            clip,
            storage_bytes(stored),
            storage_bytes(scale),
            rows.tokens,
            eps,
            rows.outer_stride,
            rows.stride,
            scales.stride,
            shifts.stride,
            CHANNELS=channels,
            RMS=norm == "rms",
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=mod_scale is not None,
            HAS_SHIFT=mod_shift is not None,
            HAS_PERM=perm is not None,
            HAS_GLOBAL=global_scale is not None,
            HAS_CLIP=clip is not None,
            NATIVE_FP8=native_fp8(x.device),
            num_warps=tile.warps,
            **row_constants(fmt, tile, rotation, carrier, x.dtype),
        )
    return as_carried(stored, carrier), scale
