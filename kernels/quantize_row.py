"""Device function that rotates, quantizes and stores rows held on chip: the tail of the row kernels.

A program holds ROWS rows as two pieces of power-of-two length, HEAD and TAIL (0: none), so that
3072 channels are 2048 + 1024 and no lane is idle. The form that is stored is the carrier's
(`pq_fx.kernels.reference_ops.quantize`); equal fp32 inputs give the reference's bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.group_scales import element_code, group_scales, largest, round_elements
from pq_fx.kernels.reference import ROW_SCALE_FLOOR
from pq_fx.kernels.rotate_row import rotate
from pq_fx.kernels.rounding import as_bytes, bits_of, divide_rounded, e4m3_byte, float_of, widen

_ROW_SCALE_FLOOR = tl.constexpr(ROW_SCALE_FLOOR)


@triton.jit
def _groups(
    y,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    BY_DOT: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Rotated groups fp32 [ROWS, G, g] of y [ROWS, LENGTH] and their largest magnitudes; infinity gives NaN.

    int4f, int3f: their extremes, with a sign.
    """
    if ROTATION > 0:
        y = rotate(y, ROWS, LENGTH, ROTATION, BY_DOT)
    size: tl.constexpr = GROUP if GROUP > 0 else LENGTH
    groups = tl.reshape(widen(y), [ROWS, LENGTH // size, size])
    amax = largest(groups, 2, ELEMENT)
    return groups, amax + (
        amax - amax
    )  # an infinite group is NaN in every format, as in the reference


@triton.jit
def _row_scale(value, FIRST: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Largest group factor [ROWS] of value [ROWS, G]; groups beyond CHANNELS do not count."""
    # Without the sign, so bits order as integers, NaN last.
    bits = bits_of(value) & 0x7FFFFFFF
    if GROUP > 0 and FIRST + value.shape[1] * GROUP > CHANNELS:
        index = FIRST + tl.arange(0, value.shape[1]) * GROUP
        bits = tl.where((index < CHANNELS)[None, :], bits, 0)
    return float_of(tl.max(bits, axis=1))


@triton.jit
def _store_piece(
    groups,
    stored,
    divisor,
    inverse,
    value,
    row,
    row_inverse,
    data_ptr,
    scale_ptr,
    rows,
    live,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    CARRIER: tl.constexpr,
    UNIT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    # fp8 rows carried as e4m3: the factor below is 1 or NaN, and one rounding is enough.
    later: tl.constexpr = CARRIER == "e4m3" and ELEMENT == "e4m3" and GROUP == 0
    elements = round_elements(groups, divisor, inverse, ELEMENT, SCALE, TOP, HAS_CLIP, later)
    width: tl.constexpr = 2 if CARRIER == "e2m1" else 1  # channels in a byte of data
    if CARRIER == "e4m3":
        factor = divide_rounded(value, row[:, None], row_inverse[:, None])
        data = e4m3_byte(elements * factor[:, :, None], NATIVE_FP8)
    else:
        _store_scales(
            stored, scale_ptr, rows, live, FIRST, CHANNELS, GROUP if GROUP > 0 else CHANNELS, SCALE
        )
        if CARRIER == "codes":
            data = element_code(elements, ELEMENT)
        elif CARRIER == "int8":
            data = (elements * UNIT).to(tl.int32).to(tl.uint8)
        else:
            tl.static_assert(CARRIER == "e2m1")
            pairs = tl.reshape(element_code(elements, ELEMENT), [ROWS, LENGTH // 2, 2])
            even, odd = tl.split(pairs)
            data = even | (odd << 4)
    byte = FIRST // width + tl.arange(0, LENGTH // width)
    mask = live[:, None]
    if FIRST + LENGTH > CHANNELS:
        mask = mask & (byte < CHANNELS // width)[None, :]
    target = data_ptr + rows[:, None] * (CHANNELS // width) + byte[None, :]
    tl.store(target, tl.reshape(data, [ROWS, LENGTH // width]), mask=mask)


@triton.jit
def _store_scales(
    stored,
    scale_ptr,
    rows,
    live,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Store group scales [ROWS, G] of channels from FIRST on; one scale a row (SIZE = CHANNELS) once."""
    if SIZE < CHANNELS or FIRST == 0:
        index = FIRST // SIZE + tl.arange(0, stored.shape[1])
        target = scale_ptr + rows[:, None] * (CHANNELS // SIZE) + index[None, :]
        present = live[:, None] & (index * SIZE < CHANNELS)[None, :]
        if SCALE == "bf16" or SCALE == "pow2":
            # Already on bf16's lattice: dropping the low half is exact.
            tl.store(target, stored.to(tl.bfloat16), mask=present)
        elif SCALE == "fp32":
            tl.store(target, stored, mask=present)
        else:
            tl.store(target, stored.to(tl.uint8), mask=present)


@triton.jit
def quantize_rows_store(
    head,
    tail,
    data_ptr,
    scale_ptr,
    global_ptr,
    clip_ptr,
    rows,
    live,
    HAS_GLOBAL: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    CHANNELS: tl.constexpr,
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
    """Rotate, quantize and store rows: head [ROWS, HEAD], then tail [ROWS, TAIL] if TAIL > 0.

    head, tail: 16 bits or fp32, zero beyond CHANNELS. rows [ROWS] int64 are their numbers in data,
    bytes of a CARRIER, and scale (`carriers`: [M, CHANNELS / GROUP] in its storage dtype, or fp32
    [M] for "e4m3"), `live` [ROWS] tells which of them exist.
    """
    if (SCALE == "e4m3" or SCALE == "4over6") and CARRIER != "e4m3":
        scale_ptr = as_bytes(scale_ptr)
    global_scale = 1.0
    if HAS_GLOBAL:
        global_scale = tl.load(global_ptr).to(tl.float32)
    groups, amax = _groups(head, ROWS, HEAD, GROUP, ROTATION, BY_DOT, ELEMENT)
    if TAIL > 0:
        tail_groups, tail_amax = _groups(tail, ROWS, TAIL, GROUP, ROTATION, BY_DOT, ELEMENT)
        if GROUP == 0:
            amax = tl.maximum(amax, tail_amax, propagate_nan=tl.PropagateNan.ALL)
            tail_amax = amax
        if HAS_CLIP:
            tail_amax = tail_amax * tl.load(clip_ptr)
        tail_scales = group_scales(tail_groups, tail_amax, global_scale, ELEMENT, SCALE, TOP)
    if HAS_CLIP:
        amax = amax * tl.load(clip_ptr)
    scales = group_scales(groups, amax, global_scale, ELEMENT, SCALE, TOP)
    row = tl.full([ROWS], 0.0, tl.float32)
    row_inverse = row
    if CARRIER == "e4m3":
        row = _row_scale(scales[3], 0, GROUP, CHANNELS)
        if TAIL > 0:
            tail_row = _row_scale(tail_scales[3], HEAD, GROUP, CHANNELS)
            row = tl.maximum(row, tail_row, propagate_nan=tl.PropagateNan.ALL)
        row = row * (1.0 / GAIN)
        row = tl.maximum(row, _ROW_SCALE_FLOOR, propagate_nan=tl.PropagateNan.ALL)
        row_inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), row)
        tl.store(scale_ptr + rows, row, mask=live)
    _store_piece(
        groups,
        scales[0],
        scales[1],
        scales[2],
        scales[3],
        row,
        row_inverse,
        data_ptr,
        scale_ptr,
        rows,
        live,
        0,
        CHANNELS,
        ROWS,
        HEAD,
        GROUP,
        ELEMENT,
        SCALE,
        TOP,
        HAS_CLIP,
        CARRIER,
        UNIT,
        NATIVE_FP8,
    )
    if TAIL > 0:
        _store_piece(
            tail_groups,
            tail_scales[0],
            tail_scales[1],
            tail_scales[2],
            tail_scales[3],
            row,
            row_inverse,
            data_ptr,
            scale_ptr,
            rows,
            live,
            HEAD,
            CHANNELS,
            ROWS,
            TAIL,
            GROUP,
            ELEMENT,
            SCALE,
            TOP,
            HAS_CLIP,
            CARRIER,
            UNIT,
            NATIVE_FP8,
        )
