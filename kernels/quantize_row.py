"""Device functions that rotate, quantize and store rows held on chip: the tail of the row kernels.

A program holds ROWS rows as two pieces of power-of-two length, HEAD and TAIL (0: none), so that
3072 channels are 2048 + 1024 and no lane is idle. Rows of 16 bits are rotated by tensor cores: one
`tl.dot` of [groups, SIZE] with the +-1 Hadamard matrix, whose products are exact; sums are fp32.
Everything else follows `pq_fx.kernels.reference` step by step, so equal fp32 inputs give equal
bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.reference import E4M3_MAX, E4M3_TINY, ROW_SCALE_FLOOR, SCALE_FLOOR
from pq_fx.kernels.rounding import (
    as_bytes,
    bits_of,
    clamp_symmetric,
    divide_rounded,
    e4m3_byte,
    e4m3_value,
    float_of,
    reciprocal,
    round_bfloat16,
    round_float_lattice,
    round_integer,
)
from pq_fx.kernels.rows import INTERPRETED

_SCALE_FLOOR = tl.constexpr(SCALE_FLOOR)
_ROW_SCALE_FLOOR = tl.constexpr(ROW_SCALE_FLOOR)
_E4M3_TINY = tl.constexpr(E4M3_TINY)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_MIN_NORMAL = tl.constexpr(2.0**-126)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def hadamard_signs(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Sylvester's Hadamard matrix [SIZE, SIZE] of +-1 in a float DTYPE; SIZE up to 128.

    Sizes of 16 and 64 have entries +-1/4 and +-1/8, for the normalization by 1 / sqrt(SIZE).

    Entry (i, j) is -1 where i & j has an odd number of bits. The parities of 32 columns of a row
    are one word, made once a row.
    """
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    word = tl.where((i & 1) != 0, -1431655766, 0)  # 0xAAAAAAAA: columns whose bit 0 is set
    word ^= tl.where((i & 2) != 0, -858993460, 0)
    word ^= tl.where((i & 4) != 0, -252645136, 0)
    word ^= tl.where((i & 8) != 0, -16711936, 0)
    word ^= tl.where((i & 16) != 0, -65536, 0)
    odd = word >> (j & 31)
    if SIZE > 32:
        odd ^= (i >> 5) & (j >> 5)
    if SIZE > 64:
        odd ^= (i >> 6) & (j >> 6)
    one: tl.constexpr = 0x3E800000 if SIZE == 16 else (0x3E000000 if SIZE == 64 else 0x3F800000)
    return float_of(((odd & 1) << 31) | one).to(DTYPE)


@triton.jit
def gather_row(
    y,
    perm_ptr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """y [1, HEAD] in the order of perm int32 [CHANNELS], through shared memory; one row, one piece."""
    tl.static_assert(ROWS == 1 and TAIL == 0)
    at = tl.arange(0, HEAD)
    source = tl.load(perm_ptr + at, mask=at < CHANNELS, other=0)
    source = tl.where(at < CHANNELS, source, at)
    return tl.reshape(tl.gather(tl.reshape(y, [HEAD]), source, 0), [1, HEAD])


@triton.jit
def rotate(y, ROWS: tl.constexpr, LENGTH: tl.constexpr, SIZE: tl.constexpr, BY_DOT: tl.constexpr):
    """Block Hadamard of rows y [ROWS, LENGTH]; fp32 out.

    BY_DOT: on tensor cores, y of 16 bits. Else by butterflies in the order of `reference.rotate`.
    """
    if BY_DOT:
        dtype: tl.constexpr = tl.float32 if _INTERPRETED else y.dtype
        blocks = tl.reshape(y, [ROWS * LENGTH // SIZE, SIZE]).to(dtype)
        y = tl.dot(blocks, hadamard_signs(SIZE, dtype), input_precision="ieee")
    else:
        y = y.to(tl.float32)
        for i in tl.static_range(SIZE.bit_length() - 1):
            pairs = tl.reshape(y, [ROWS * LENGTH // (2 << i), 2, 1 << i])
            a, b = tl.split(tl.permute(pairs, [0, 2, 1]))
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS * LENGTH])
    y = tl.reshape(y, [ROWS, LENGTH])
    if BY_DOT and (SIZE == 16 or SIZE == 64):
        return y
    else:
        return y * (SIZE**-0.5)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    """Largest magnitude along an axis; NaN wins."""
    if _INTERPRETED:
        # As integers: the magnitude's order is kept, and NaN is larger than everything.
        return float_of(tl.max(bits_of(x) & 0x7FFFFFFF, axis=axis))
    else:
        return tl.reduce(tl.abs(x), axis, _larger)


@triton.jit
def group_scales(
    groups, amax, global_scale, ELEMENT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr
):
    """Scales of groups [R, G, g] with largest magnitudes amax [R, G], and how to encode with them.

    Returns (stored, divisor, inverse, value), each [R, G]: `stored` the byte of one-byte scales and
    the fp32 value of others, `x / divisor` (or x * inverse where the format is defined so) the
    scaled element, `value` the factor that dequantizes, global scale included.
    """
    if SCALE == "e8m0":
        exponent = tl.maximum(((bits_of(amax) >> 23) & 255) - 2, 0)
        whole = tl.maximum(exponent, 1)
        nan = amax != amax
        value = float_of(tl.where(exponent == 0, 1 << 22, exponent << 23))
        value = tl.where(nan, amax, value)
        divisor = tl.where(nan, amax, float_of(whole << 23))
        # A power of two: its reciprocal is exact, so the product equals the quotient.
        inverse = float_of(tl.where(whole == 254, 1 << 22, (254 - whole) << 23))
        inverse = tl.where(nan, amax, inverse)
        return tl.where(nan, 255, exponent), divisor, inverse, value
    elif SCALE == "e4m3":
        one = tl.full(amax.shape, 1.0, tl.float32)
        whole = one * global_scale
        inverse_whole = tl.div_rn(one, whole)
        scale = divide_rounded(divide_rounded(amax, TOP, 1.0 / TOP), whole, inverse_whole)
        limited = tl.minimum(tl.maximum(scale, _E4M3_TINY), _E4M3_MAX)
        limited = tl.where(scale == scale, limited, scale)
        # Group-level, so the integer form costs little and runs on every chip.
        stored = e4m3_byte(limited, False).to(tl.int32)
        divisor = e4m3_value(stored)
        inverse = tl.div_rn(inverse_whole, divisor)
        return stored, divisor, inverse, global_scale * divisor
    elif SCALE == "pow2":
        below = float_of(bits_of(amax) & 0x7F800000)
        scale = tl.maximum(below * (0.25 if TOP == 7.0 else 0.5), _SCALE_FLOOR)
        scale = tl.where(scale * TOP < amax, scale * 2.0, scale)
        inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
        # A power of two: its reciprocal is exact, so the product equals the quotient.
        scaled = groups * inverse[:, :, None]
        full = scaled - clamp_symmetric(round_integer(scaled), TOP)
        doubled = scaled * 2.0
        half = (doubled - clamp_symmetric(round_integer(doubled), TOP)) * 0.5
        # Integers below 2^24: exact in any order of summation.
        full_error = tl.sum(round_integer(full * full * 4096.0), axis=2)
        half_error = tl.sum(round_integer(half * half * 4096.0), axis=2)
        halve = (half_error < full_error) & (scale > _SCALE_FLOOR)
        scale = tl.where(halve, scale * 0.5, scale)
        inverse = tl.where(halve, inverse * 2.0, inverse)
        return scale, scale, inverse, scale
    else:
        scale = divide_rounded(amax, TOP, 1.0 / TOP)
        scale = tl.where(scale == scale, tl.maximum(scale, _SCALE_FLOOR), scale)
        if SCALE == "bf16":
            scale = round_bfloat16(scale)
            inverse = reciprocal(scale)
        else:
            inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
        return scale, scale, inverse, scale


@triton.jit
def round_elements(
    groups,
    divisor,
    inverse,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    HAS_CLIP: tl.constexpr,
):
    """Element values (fp32, before their scale) that groups [R, G, g] are rounded to."""
    if SCALE == "e4m3" or SCALE == "e8m0" or SCALE == "pow2":
        # nvfp4 is defined by the product; the other two have powers of two, where it is exact.
        scaled = groups * inverse[:, :, None]
    else:
        scaled = divide_rounded(groups, divisor[:, :, None], inverse[:, :, None])
    if ELEMENT == "e2m1":
        return clamp_symmetric(round_float_lattice(clamp_symmetric(scaled, TOP), 0, 1), TOP)
    elif ELEMENT == "e4m3":
        magnitude = tl.abs(round_float_lattice(clamp_symmetric(scaled, TOP), -6, 3))
        # The sign of the input: the division's last multiply-add turns -0 into +0.
        return float_of(bits_of(magnitude) | (bits_of(groups) & -2147483648))
    elif SCALE == "pow2" or HAS_CLIP:
        return clamp_symmetric(round_integer(scaled), TOP)
    else:
        # amax / scale is at most TOP * (1 + 2^-8), which rounds to TOP: no clamp.
        return round_integer(scaled)


@triton.jit
def element_code(value, ELEMENT: tl.constexpr):
    """Code points (uint8) of element values that lie on the format's lattice."""
    if ELEMENT == "e4m3":
        return e4m3_byte(value, False)
    elif ELEMENT == "int8":
        return value.to(tl.int32).to(tl.uint8)
    elif ELEMENT == "e2m1":
        magnitude = tl.abs(value)
        normal = (bits_of(magnitude) >> 22) - 252
        code = tl.where(magnitude < 1.0, (magnitude * 2.0).to(tl.int32), normal)
        return (code | ((bits_of(value) >> 28) & 8)).to(tl.uint8)
    else:
        sign_bit: tl.constexpr = 8 if ELEMENT == "int4" else 4
        magnitude = tl.abs(value).to(tl.int32)
        return (magnitude | tl.where(value < 0, sign_bit, 0)).to(tl.uint8)


@triton.jit
def _groups(
    y,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    BY_DOT: tl.constexpr,
):
    """Rotated groups fp32 [ROWS, G, g] of y [ROWS, LENGTH] and their largest magnitudes; infinity gives NaN."""
    if ROTATION > 0:
        y = rotate(y, ROWS, LENGTH, ROTATION, BY_DOT)
    size: tl.constexpr = GROUP if GROUP > 0 else LENGTH
    groups = tl.reshape(y.to(tl.float32), [ROWS, LENGTH // size, size])
    amax = largest(groups, 2)
    return groups, amax + (
        amax - amax
    )  # an infinite group is NaN in every format, as in the reference


@triton.jit
def _row_scale(value, FIRST: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Largest group factor [ROWS] of value [ROWS, G]; groups beyond CHANNELS do not count."""
    # Positive or NaN, so their bits order as integers.
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
    NATIVE_FP8: tl.constexpr,
):
    elements = round_elements(groups, divisor, inverse, ELEMENT, SCALE, TOP, HAS_CLIP)
    if CARRIER == "codes":
        data = element_code(elements, ELEMENT)
        size: tl.constexpr = GROUP if GROUP > 0 else CHANNELS
        index = FIRST // size + tl.arange(0, stored.shape[1])
        target = scale_ptr + rows[:, None] * (CHANNELS // size) + index[None, :]
        present = live[:, None] & (index * size < CHANNELS)[None, :]
        if GROUP > 0 or FIRST == 0:
            if SCALE == "bf16" or SCALE == "pow2":
                # Already on bf16's lattice: dropping the low half is exact.
                tl.store(target, stored.to(tl.bfloat16), mask=present)
            elif SCALE == "fp32":
                tl.store(target, stored, mask=present)
            else:
                tl.store(target, stored.to(tl.uint8), mask=present)
    else:
        tl.static_assert(CARRIER == "e4m3")
        factor = divide_rounded(value, row[:, None], row_inverse[:, None])
        data = e4m3_byte(elements * factor[:, :, None], NATIVE_FP8)
    channel = FIRST + tl.arange(0, LENGTH)
    mask = live[:, None]
    if FIRST + LENGTH > CHANNELS:
        mask = mask & (channel < CHANNELS)[None, :]
    target = data_ptr + rows[:, None] * CHANNELS + channel[None, :]
    tl.store(target, tl.reshape(data, [ROWS, LENGTH]), mask=mask)


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
    NATIVE_FP8: tl.constexpr,
):
    """Rotate, quantize and store rows: head [ROWS, HEAD], then tail [ROWS, TAIL] if TAIL > 0.

    head, tail: 16 bits or fp32, zero beyond CHANNELS. rows [ROWS] int64 are their numbers in data
    uint8 [M, CHANNELS] and scale ([M, CHANNELS / GROUP] in its storage dtype for CARRIER "codes",
    fp32 [M] for "e4m3", see `reference.e4m3_operand`), `live` [ROWS] tells which of them exist.
    """
    if SCALE == "e4m3" and CARRIER == "codes":
        scale_ptr = as_bytes(scale_ptr)
    global_scale = 1.0
    if HAS_GLOBAL:
        global_scale = tl.load(global_ptr).to(tl.float32)
    groups, amax = _groups(head, ROWS, HEAD, GROUP, ROTATION, BY_DOT)
    if TAIL > 0:
        tail_groups, tail_amax = _groups(tail, ROWS, TAIL, GROUP, ROTATION, BY_DOT)
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
            NATIVE_FP8,
        )
