"""Device functions that read what is stored: code points, packed rows and group scales as fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.rounding import bits_of, e4m3_value, float_of


# Inductor writes these two into its own code, so they name no global of this module.
@triton.constexpr_function
def packed_bits(element: str) -> int:
    """`Format.bits` of an element type: bits of one packed element."""
    return {"int4": 4, "int4f": 4, "e2m1": 4, "int3": 3, "int3f": 3}.get(element, 8)


@triton.constexpr_function
def full_range(element: str) -> bool:
    """`Format.full_range` of an element type: offset binary, scales with a sign."""
    return element in ("int4f", "int3f")


@triton.jit
def code_value(code, ELEMENT: tl.constexpr):
    """fp32 element value of uint8 code points (before the scale)."""
    if ELEMENT == "e4m3":
        return e4m3_value(code)
    elif ELEMENT == "int8":
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    elif full_range(ELEMENT):
        zero: tl.constexpr = 1 << (packed_bits(ELEMENT) - 1)
        # In the lowest bits of 2^23 an integer counts 1: cheaper than a conversion.
        return float_of((code.to(tl.int32) & (2 * zero - 1)) | 0x4B000000) - (8388608.0 + zero)
    else:
        wide = code.to(tl.int32)
        sign: tl.constexpr = 1 << (packed_bits(ELEMENT) - 1)
        if ELEMENT == "e2m1":
            # Exponent and mantissa placed in fp32 read 2^-126 too small, the subnormal included.
            magnitude = float_of((wide & (sign - 1)) << 22) * 2.0**126
        else:
            magnitude = float_of((wide & (sign - 1)) | 0x4B000000) - 8388608.0
        return float_of(bits_of(magnitude) ^ ((wide & sign) << (32 - packed_bits(ELEMENT))))


@triton.jit
def code_lattice(code, ELEMENT: tl.constexpr):
    """int8 lattice points of uint8 code points: integers, e2m1's values doubled (0 to 12)."""
    if ELEMENT == "int8":
        return code.to(tl.int8, bitcast=True)
    elif full_range(ELEMENT):
        return (code.to(tl.int32) - (1 << (packed_bits(ELEMENT) - 1))).to(tl.int8)
    else:
        wide = code.to(tl.int32)
        bits: tl.constexpr = packed_bits(ELEMENT) - 1
        magnitude = wide & ((1 << bits) - 1)
        if ELEMENT == "e2m1":  # exponent e, mantissa m: m where e is 0, else (2 + m) * 2^(e - 1)
            exponent = tl.maximum(magnitude >> 1, 1) - 1
            magnitude = tl.where(magnitude < 2, magnitude, (2 + (magnitude & 1)) << exponent)
        return tl.where((wide >> bits) != 0, -magnitude, magnitude).to(tl.int8)


@triton.jit
def scale_value(stored, SCALE: tl.constexpr):
    """fp32 value of stored group scales: bf16, fp32, or bytes of e4m3 and e8m0."""
    if SCALE == "e4m3":
        return e4m3_value(stored)
    elif SCALE == "e8m0":
        wide = stored.to(tl.int32)
        value = float_of(tl.where(wide == 0, 1 << 22, wide << 23))
        return tl.where(wide == 255, float("nan"), value)
    else:
        return stored.to(tl.float32)


@triton.jit
def load_code(base, channel, mask, CHANNELS, ELEMENT: tl.constexpr):
    """Code points (uint8) of `channel` (index tensor) from packed rows that start at `base`.

    Layouts of `pq_fx.kernels.pack`: 4-bit, even channel in the low nibble; 3-bit, CHANNELS/4 bytes
    of magnitudes then CHANNELS/8 bytes of signs; 8-bit, the byte.
    """
    if packed_bits(ELEMENT) == 3:
        magnitude = tl.load(base + channel // 4, mask=mask, other=0).to(tl.int32)
        sign = tl.load(base + CHANNELS // 4 + channel // 8, mask=mask, other=0).to(tl.int32)
        low = (magnitude >> ((channel % 4) * 2)) & 3
        return (low | (((sign >> (channel % 8)) & 1) << 2)).to(tl.uint8)
    elif packed_bits(ELEMENT) == 4:
        byte = tl.load(base + channel // 2, mask=mask, other=0).to(tl.int32)
        return ((byte >> ((channel % 2) * 4)) & 15).to(tl.uint8)
    else:
        return tl.load(base + channel, mask=mask, other=0)
