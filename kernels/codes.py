"""Device functions that read what is stored: code points, packed rows and group scales as fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.rounding import bits_of, e4m3_value, float_of


@triton.jit
def code_value(code, ELEMENT: tl.constexpr):
    """fp32 element value of uint8 code points (before the scale)."""
    if ELEMENT == "e4m3":
        return e4m3_value(code)
    elif ELEMENT == "int8":
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    elif ELEMENT == "int4":
        wide = code.to(tl.int32)
        magnitude = float_of((wide & 7) | 0x4B000000) - 8388608.0  # cheaper than a conversion
        return float_of(bits_of(magnitude) ^ ((wide & 8) << 28))
    elif ELEMENT == "int4f":
        return float_of((code.to(tl.int32) & 15) | 0x4B000000) - 8388616.0
    elif ELEMENT == "int3f":
        return float_of((code.to(tl.int32) & 7) | 0x4B000000) - 8388612.0
    elif ELEMENT == "int3":
        wide = code.to(tl.int32)
        magnitude = float_of((wide & 3) | 0x4B000000) - 8388608.0
        return float_of(bits_of(magnitude) ^ ((wide & 4) << 29))
    else:
        tl.static_assert(ELEMENT == "e2m1")
        wide = code.to(tl.int32)
        # e2m1's exponent and mantissa placed in fp32 read 2^-126 too small, the subnormal included.
        magnitude = float_of((wide & 7) << 22) * 2.0**126
        return float_of(bits_of(magnitude) ^ ((wide & 8) << 28))


@triton.jit
def code_lattice(code, ELEMENT: tl.constexpr):
    """int8 lattice points of uint8 code points: integers, e2m1's values doubled (0 to 12)."""
    if ELEMENT == "int8":
        return code.to(tl.int8, bitcast=True)
    elif ELEMENT == "int4f" or ELEMENT == "int3f":
        return (code.to(tl.int32) - (8 if ELEMENT == "int4f" else 4)).to(tl.int8)
    else:
        wide = code.to(tl.int32)
        bits: tl.constexpr = 2 if ELEMENT == "int3" else 3
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
    if ELEMENT == "int3" or ELEMENT == "int3f":
        magnitude = tl.load(base + channel // 4, mask=mask, other=0).to(tl.int32)
        sign = tl.load(base + CHANNELS // 4 + channel // 8, mask=mask, other=0).to(tl.int32)
        low = (magnitude >> ((channel % 4) * 2)) & 3
        return (low | (((sign >> (channel % 8)) & 1) << 2)).to(tl.uint8)
    elif ELEMENT == "int4" or ELEMENT == "int4f" or ELEMENT == "e2m1":
        byte = tl.load(base + channel // 2, mask=mask, other=0).to(tl.int32)
        return ((byte >> ((channel % 2) * 4)) & 15).to(tl.uint8)
    else:
        return tl.load(base + channel, mask=mask, other=0)
