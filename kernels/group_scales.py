"""Device functions of group quantization: scales from largest magnitudes, elements on their lattice.

They follow `pq_fx.kernels.scale_rules` and `pq_fx.kernels.values` step by step, so equal fp32 inputs give equal bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.codes import full_range, packed_bits
from pq_fx.kernels.rounding import (
    bits_of,
    clamp_symmetric,
    divide_rounded,
    e4m3_byte,
    float_of,
    reciprocal,
    round_bfloat16,
    round_float_lattice,
    round_integer,
)
from pq_fx.kernels.rows import INTERPRETED
from pq_fx.kernels.scale_rules import E4M3_TINY, SCALE_FLOOR
from pq_fx.kernels.values import E4M3_MAX

_SCALE_FLOOR = tl.constexpr(SCALE_FLOOR)
_E4M3_TINY = tl.constexpr(E4M3_TINY)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr, ELEMENT: tl.constexpr):
    """Largest magnitude along an axis; NaN wins. int4f, int3f: with its sign, the negative one of equals."""
    if full_range(ELEMENT):
        # As integers with the sign in the lowest bit: a rotation of bits and one reduction.
        bits = x.to(tl.uint32, bitcast=True)
        most = tl.max((bits << 1) | (bits >> 31), axis=axis)
        return ((most >> 1) | (most << 31)).to(tl.float32, bitcast=True)
    elif _INTERPRETED:
        # As integers: the magnitude's order is kept, and NaN is larger than everything.
        return float_of(tl.max(bits_of(x) & 0x7FFFFFFF, axis=axis))
    else:
        return tl.reduce(tl.abs(x), axis, _larger)


@triton.jit
def _e4m3_scales(scale, inverse_whole, global_scale):
    """What `group_scales` returns for nvfp4, from scales that are not rounded yet."""
    limited = tl.minimum(tl.maximum(scale, _E4M3_TINY), _E4M3_MAX)
    # Positive and normal in e4m3, so its bits are the upper ones of fp32's, rounded to nearest even.
    bits = bits_of(limited)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    finite = scale == scale
    stored = tl.where(finite, (bits >> 20) - (120 << 3), 0x7F)
    divisor = tl.where(finite, float_of(bits), scale)
    inverse = divide_rounded(inverse_whole, divisor, reciprocal(divisor))
    return stored, divisor, inverse, global_scale * divisor


@triton.jit
def _lost(groups, divisor, inverse, TOP: tl.constexpr):
    """Squared error [R, G] of e2m1 elements of groups [R, G, g]."""
    # Magnitudes: nothing that could be contracted with the product into one rounding.
    size = tl.abs(groups * inverse[:, :, None])
    lost = size - round_float_lattice(tl.minimum(size, TOP), 0, 1)
    # Integers: exact in any order of summation.
    lost = round_integer(lost * 64.0)
    return tl.sum(lost * lost, axis=2) * (divisor * divisor)


@triton.jit
def group_scales(
    groups, amax, global_scale, ELEMENT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr
):
    """Scales of groups [R, G, g] with largest magnitudes amax [R, G], and how to encode with them.

    int4f, int3f: amax and scales have a sign.

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
    elif SCALE == "e4m3" or SCALE == "4over6":
        one = tl.full(amax.shape, 1.0, tl.float32)
        whole = one * global_scale
        inverse_whole = tl.div_rn(one, whole)
        scale = divide_rounded(divide_rounded(amax, TOP, 1.0 / TOP), whole, inverse_whole)
        six = _e4m3_scales(scale, inverse_whole, global_scale)
        if SCALE == "e4m3":
            return six
        else:
            four = _e4m3_scales(scale * 1.5, inverse_whole, global_scale)
            better = _lost(groups, four[1], four[2], TOP) < _lost(groups, six[1], six[2], TOP)
            return (
                tl.where(better, four[0], six[0]),
                tl.where(better, four[1], six[1]),
                tl.where(better, four[2], six[2]),
                tl.where(better, four[3], six[3]),
            )
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
    elif full_range(ELEMENT):
        scale = amax * (-1.0 / TOP)
        scale = round_bfloat16(tl.where(tl.abs(scale) < _SCALE_FLOOR, _SCALE_FLOOR, scale))
        return scale, scale, reciprocal(scale), scale
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
    LATER: tl.constexpr = False,
):
    """Element values (fp32, before their scale) that groups [R, G, g] are rounded to.

    LATER: e4m3 elements only, not rounded yet: the caller makes e4m3 of them as they are.
    """
    if SCALE == "e4m3" or SCALE == "4over6" or SCALE == "e8m0" or SCALE == "pow2":
        # nvfp4 is defined by the product; the other two have powers of two, where it is exact.
        scaled = groups * inverse[:, :, None]
    else:
        scaled = divide_rounded(groups, divisor[:, :, None], inverse[:, :, None])
    if ELEMENT == "e2m1":
        return clamp_symmetric(round_float_lattice(clamp_symmetric(scaled, TOP), 0, 1), TOP)
    elif ELEMENT == "e4m3":
        if HAS_CLIP:
            scaled = clamp_symmetric(scaled, TOP)
        # Without a clip amax / scale is at most TOP * (1 + 2^-23), which rounds to TOP.
        magnitude = tl.abs(scaled if LATER else round_float_lattice(scaled, -6, 3))
        # The sign of the input: the division's last multiply-add turns -0 into +0.
        return float_of(bits_of(magnitude) | (bits_of(groups) & -2147483648))
    elif full_range(ELEMENT):
        # Without a clip only the end that no scale was made for saturates.
        elements = tl.minimum(round_integer(scaled), TOP - 1.0)
        return tl.maximum(elements, -TOP) if HAS_CLIP else elements
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
    elif full_range(ELEMENT):
        # Added to 2^23 an integer stands in the lowest bits; cheaper than a conversion.
        return bits_of(value + (8388608.0 + (1 << (packed_bits(ELEMENT) - 1)))).to(tl.uint8)
    elif ELEMENT == "e2m1":
        magnitude = tl.abs(value)
        normal = (bits_of(magnitude) >> 22) - 252
        code = tl.where(magnitude < 1.0, (magnitude * 2.0).to(tl.int32), normal)
        return (code | ((bits_of(value) >> 28) & 8)).to(tl.uint8)
    else:
        sign_bit: tl.constexpr = 1 << (packed_bits(ELEMENT) - 1)
        magnitude = tl.abs(value).to(tl.int32)
        return (magnitude | tl.where(value < 0, sign_bit, 0)).to(tl.uint8)
