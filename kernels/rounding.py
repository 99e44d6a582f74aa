"""Device functions that the Triton kernels share: rounding to formats, step by step as the reference.

Equal fp32 inputs give equal bytes: divisions are correctly rounded, roundings are to nearest even.
`tl.constexpr` arguments are written in CAPS. Bytes of e4m3 are computed in integers where a chip
(sm_80) or Triton's interpreter has no such conversion (`NATIVE_FP8=False`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.rows import INTERPRETED

# Constants as tl.constexpr: the only globals that Triton lets a kernel read.
# 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest even integer, never to -0.
_ROUND = tl.constexpr(12582912.0)
# Triton's interpreter rounds twice in a fused multiply-add, so there a true division is used
# instead.
_EXACT_FMA = tl.constexpr(not INTERPRETED)


@triton.jit
def as_bytes(ptr):
    """A pointer to e4m3 or bytes as one to bytes: views cost a call of the host, this costs nothing."""
    return ptr.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def bits_of(x):
    """The fp32 bit pattern as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """int32 bit pattern as fp32."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_integer(x):
    """Nearest even integer of |x| < 2^22, in fp32; never -0."""
    return (x + _ROUND) - _ROUND


@triton.jit
def clamp_symmetric(x, TOP: tl.constexpr):
    """x limited to -TOP..TOP."""
    return tl.minimum(tl.maximum(x, -TOP), TOP)


@triton.jit
def divide_rounded(x, divisor, inverse):
    """Correctly rounded x / divisor, given inverse = correctly rounded 1 / divisor (Markstein).

    Two fused multiply-adds an element where a division takes ten instructions.
    """
    if _EXACT_FMA:
        quotient = x * inverse
        # The divisor's sign, not the quotient's: one divisor serves a group.
        return tl.fma(tl.fma(quotient, -divisor, x), inverse, quotient)
    else:
        return tl.div_rn(x, divisor)


@triton.jit
def reciprocal(x):
    """Correctly rounded 1 / x of normal x with at most 23 significant bits (bf16 scales), or NaN.

    One Newton step from an approximation good to a unit in the last place is exact unless x's
    mantissa is all ones (Markstein); tests/no_device/test_rounding_device.py tries every bf16.
    """
    if _EXACT_FMA:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(tl.fma(-x, near, 1.0), near, near)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def inverse_one_plus_exp2(x):
    """1 / (1 + 2^x) by the hardware's approximations: a few units in the last place, no branch."""
    if _EXACT_FMA:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(tl.minimum(x, 127.0)))


@triton.jit
def round_bfloat16(x):
    """x rounded to bf16 (nearest even), as fp32; NaN stays NaN."""
    if _EXACT_FMA:
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        # Triton's interpreter drops bits where it converts.
        bits = bits_of(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, float_of(rounded), x)


@triton.jit
def round_row(x, DTYPE: tl.constexpr):
    """fp32 x rounded to DTYPE (nearest even), as the float model hands it on; fp32 stays."""
    if tl.bfloat16 != DTYPE:
        return x.to(DTYPE)
    elif _EXACT_FMA:
        # In pairs: one at a time the conversion runs at a quarter of the rate.
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        # Triton's interpreter drops bits where it converts.
        return round_bfloat16(x).to(tl.bfloat16)


@triton.jit
def widen(x):
    """x as fp32; bf16 in pairs, two instructions where a conversion of each takes three."""
    if _EXACT_FMA and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def round_float_lattice(x, MIN_EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """x rounded to floats of MANTISSA explicit bits, exponents >= MIN_EXPONENT (subnormals below).

    Adding 2^(exponent + 23 - MANTISSA) pushes the bits to be dropped out of fp32's mantissa.
    """
    a = tl.abs(x)
    exponent = tl.maximum(bits_of(a) & 0x7F800000, (MIN_EXPONENT + 127) << 23)
    magic = float_of(exponent + ((23 - MANTISSA) << 23))
    rounded = (a + magic) - magic
    return float_of(bits_of(rounded) | (bits_of(x) & -2147483648))


@triton.jit
def e4m3_byte(x, NATIVE_FP8: tl.constexpr):
    """e4m3fn byte (uint8) of x, nearest even; |x| <= 448 or NaN."""
    if NATIVE_FP8:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        value = round_float_lattice(x, -6, 3)
        magnitude = tl.abs(value)
        normal = (bits_of(magnitude) >> 20) - (120 << 3)
        byte = tl.where(magnitude < 2.0**-6, (magnitude * 512.0).to(tl.int32), normal)
        byte = tl.where(x == x, byte, 0x7F)
        return (byte | ((bits_of(value) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_value(byte):
    """fp32 value of e4m3fn bytes (uint8), in integers and one product: any chip."""
    wide = byte.to(tl.int32)
    magnitude = wide & 0x7F
    # Placed in fp32's exponent and mantissa the byte reads 2^-120 too small, subnormals included.
    value = float_of(magnitude << 20) * 2.0**120
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return float_of(bits_of(value) | ((wide & 0x80) << 24))
