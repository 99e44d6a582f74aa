"""Quantization of one group with Python loops in float64: an independent reference for the tests.

Written from the format definitions (lists of representable values, nearest with ties to the even
code), sharing nothing with `pq_fx.kernels`.
"""

from __future__ import annotations

import bisect
import math

import numpy as np

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [
    (m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7)
    for e in range(16)
    for m in range(8)
    if (e, m) != (15, 7)
]


def nearest_code(magnitude: float, values: list[float]) -> int:
    """Index of the nearest value, ties to the even index, saturating."""
    above = bisect.bisect_left(values, magnitude)
    if above == len(values):
        return len(values) - 1
    if above == 0 or values[above] == magnitude:
        return above
    low, high = magnitude - values[above - 1], values[above] - magnitude
    if low == high:
        return above if above % 2 == 0 else above - 1
    return above if high < low else above - 1


def round_bits(value: float, bits: int) -> float:
    """Round to a significand of `bits` bits, nearest even."""
    if value == 0:
        return 0.0
    mantissa, exponent = math.frexp(value)
    return math.ldexp(float(np.rint(mantissa * 2**bits)), exponent - bits)


def f32(value: float) -> float:
    return float(np.float32(value))


def integer_group(x: list[float], top: int, scale: float) -> tuple[list[int], list[float]]:
    """Signed integers and values of a group under a given scale."""
    q = [max(-top, min(top, int(np.rint(f32(v / scale))))) for v in x]
    return q, [i * scale for i in q]


def quantize_group(
    x: list[float], name: str, scale_type: str, global_scale: float | None = None
) -> tuple[list[int], float, list[float]]:
    """(code points, scale as a factor, values) of one group; no search over scales.

    Not decided here are pow2 (`pow2_candidates` gives its two scales) and 4over6 (`nvfp4_group` with 1 and 1.5).
    """
    amax = max(abs(v) for v in x)
    if name in ("int4f", "int3f"):
        half = 8 if name == "int4f" else 4
        extreme = -amax if -amax in x else amax
        scale = round_bits(f32(extreme / -half), 8) if amax / half >= 2.0**-100 else 2.0**-100
        q = [max(-half, min(half - 1, int(np.rint(f32(v / scale))))) for v in x]
        return [i + half for i in q], scale, [i * scale for i in q]
    if name in ("int4", "int3", "int8", "fp8"):
        top = {"int4": 7, "int3": 3, "int8": 127, "fp8": 448}[name]
        scale = max(f32(amax / top), 2.0**-100)
        if scale_type == "bf16":
            scale = round_bits(scale, 8)
        if name == "fp8":
            codes = [
                nearest_code(abs(f32(v / scale)), E4M3) + (128 if math.copysign(1, v) < 0 else 0)
                for v in x
            ]
            return (
                codes,
                scale,
                [math.copysign(E4M3[c % 128], v) * scale for c, v in zip(codes, x, strict=True)],
            )
        q, values = integer_group(x, top, scale)
        if name == "int8":
            return [i % 256 for i in q], scale, values
        return [abs(i) + (top + 1 if i < 0 else 0) for i in q], scale, values
    if name == "mxfp4":
        exponent = max(-127, (math.frexp(amax)[1] - 1 if amax else -300) - 2)
        scale = 2.0**exponent
        scaled = [f32(v / max(scale, 2.0**-126)) for v in x]
    else:
        return nvfp4_group(x, global_scale)
    codes = [nearest_code(abs(v), E2M1) + (8 if math.copysign(1, v) < 0 else 0) for v in scaled]
    return codes, scale, e2m1_values(codes, x, scale)


def nvfp4_group(
    x: list[float], global_scale: float | None = None, ratio: float = 1.0
) -> tuple[list[int], float, list[float]]:
    """As `quantize_group`, the scale from ratio * amax / 6: a ratio of 1.5 puts the largest element on 4."""
    tensor_scale = 1.0 if global_scale is None else global_scale
    wanted = f32(f32(f32(max(abs(v) for v in x) / 6) / tensor_scale) * ratio)
    stored = E4M3[nearest_code(max(2.0**-6, wanted), E4M3)]
    factor = f32(f32(1 / tensor_scale) / stored)
    scaled = [f32(v * factor) for v in x]
    codes = [nearest_code(abs(v), E2M1) + (8 if math.copysign(1, v) < 0 else 0) for v in scaled]
    scale = f32(tensor_scale * stored)
    return codes, scale, e2m1_values(codes, x, scale)


def e2m1_values(codes: list[int], x: list[float], scale: float) -> list[float]:
    """Values of e2m1 code points with the signs of x."""
    return [math.copysign(E2M1[c % 8], v) * scale for c, v in zip(codes, x, strict=True)]


def pow2_candidates(x: list[float], top: int) -> tuple[float, float]:
    """The smallest power of two that is at least amax / top, and its half."""
    amax = max(abs(v) for v in x)
    exponent = -100
    while top * 2.0**exponent < amax:
        exponent += 1
    return 2.0**exponent, 2.0 ** (exponent - 1)


def hadamard(n: int) -> np.ndarray:
    """Sylvester's matrix by its definition: entry (i, j) is (-1)^popcount(i & j), over sqrt(n)."""
    signs = [[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return np.array(signs, dtype=np.float64) / math.sqrt(n)
