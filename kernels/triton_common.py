"""Device functions that the Triton kernels share: rounding, scales, code points, rotation, rows.

Every function follows `pq_fx.kernels.reference` step by step, so that equal fp32 inputs give equal
bytes: divisions are correctly rounded, roundings are to nearest even, and the kernels are launched
with `enable_fp_fusion=False`, which keeps the compiler from contracting a product and a sum into
one. `tl.constexpr` arguments are written in CAPS. Bytes of e4m3 are computed in integers where a
chip (sm_80) or Triton's interpreter has no such conversion (`NATIVE_FP8=False`).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.errors import FormatError, PQError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import recording
from pq_fx.kernels.reference import E4M3_MAX, E4M3_TINY, ROW_SCALE_FLOOR, SCALE_FLOOR

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# Constants as tl.constexpr: the only globals that Triton lets a kernel read.
_SCALE_FLOOR = tl.constexpr(SCALE_FLOOR)
_ROW_SCALE_FLOOR = tl.constexpr(ROW_SCALE_FLOOR)
_E4M3_TINY = tl.constexpr(E4M3_TINY)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_MIN_NORMAL = tl.constexpr(2.0**-126)
# 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to the nearest even integer, never to -0.
_ROUND = tl.constexpr(12582912.0)
# Triton's interpreter rounds twice in a fused multiply-add, so there a true division is used
# instead.
_EXACT_FMA = tl.constexpr(not INTERPRETED)


class KernelError(PQError, ValueError):
    """A tensor handed to a kernel has the wrong shape, dtype or device; the message says which."""


def require(condition: bool, message: str) -> None:
    """Raise KernelError with `message` unless `condition` holds."""
    if not condition:
        raise KernelError(message)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current one for a launch; nothing to do where it is already."""
    require(
        x.device.type == "cuda" or INTERPRETED,
        f"a Triton kernel got a tensor on {x.device}; it needs CUDA (or TRITON_INTERPRET=1)",
    )
    if recording() or x.device.type != "cuda":
        return nullcontext()
    if x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)


def native_fp8(device: torch.device) -> bool:
    """Whether Triton converts to e4m3 in hardware on `device` (sm_89 and newer)."""
    if INTERPRETED or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@dataclass(frozen=True)
class Rows:
    """A tensor [..., K] as rows; row m starts at (m // inner) * outer_stride + m % inner *
    stride."""

    tensor: Tensor
    count: int
    inner: int
    outer_stride: int
    stride: int


def as_rows(x: Tensor, name: str) -> Rows:
    """View [..., K] as rows without a copy where two strides describe it, else copy it.

    Sliced and chunked tensors (q, k, v of one projection, the halves of a GLU) need no copy.
    """
    require(x.dim() >= 1, f"{name} must have at least one axis, got a scalar")
    channels = x.shape[-1]
    if x.stride(-1) != 1 and channels > 1:
        x = x.contiguous()
    if x.dim() <= 2:
        y = x.reshape(-1, channels)
        return Rows(y, y.shape[0], max(y.shape[0], 1), 0, y.stride(0))
    y = x.reshape(-1, x.shape[-2], channels)
    count = y.shape[0] * y.shape[1]
    return Rows(y, count, max(y.shape[1], 1), y.stride(0), y.stride(1))


def storage_bytes(tensor: Tensor) -> Tensor:
    """e4m3 tensors as uint8 for Triton's interpreter and for chips without fp8; others as they are.

    Kernels take either (`as_bytes`).
    """
    if tensor.element_size() > 1 or native_fp8(tensor.device):
        return tensor
    return tensor.view(torch.uint8)


def padded_length(channels: int) -> int:
    """Power of two that holds a row; raises KernelError for rows too long for one program."""
    require(
        0 < channels <= 65536,
        f"rows of {channels} channels do not fit one program (1 to 65536); split the linear",
    )
    return max(16, triton.next_power_of_2(channels))


def row_warps(length: int) -> int:
    """Warps of a program that holds a row of `length`: 32 elements a thread (measured on H100)."""
    return min(max(length // 1024, 1), 32)


def scale_dtype(fmt: Format) -> torch.dtype:
    """Storage dtype of a format's group scales."""
    return {
        "bf16": torch.bfloat16,
        "pow2": torch.bfloat16,
        "e4m3": torch.float8_e4m3fn,
        "e8m0": torch.uint8,
        "fp32": torch.float32,
    }[fmt.scale]


def check_perm(perm: Tensor | None, channels: int, device: torch.device) -> None:
    """Raise KernelError unless perm is None or int32 [channels] on `device`."""
    if perm is None:
        return
    require(perm.dtype == torch.int32, f"perm must be int32, got {perm.dtype}; call perm.int()")
    require(
        tuple(perm.shape) == (channels,),
        f"perm has shape {tuple(perm.shape)}, expected ({channels},), one entry a channel",
    )
    require(perm.device == device, f"perm is on {perm.device}, x on {device}")


def check_rotation(rotation: int, channels: int) -> None:
    """Raise FormatError unless rotation is 0 or a power of two that divides the channels."""
    if rotation and (rotation < 0 or rotation & (rotation - 1) or channels % rotation):
        raise FormatError(
            f"rotation size {rotation} is not a power of two that divides K={channels}; "
            "use the group size, or 0 for none"
        )


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
        return tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
    else:
        return tl.div_rn(x, divisor)


@triton.jit
def round_bfloat16(x):
    """x rounded to bf16 (nearest even), as fp32; NaN stays NaN."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, float_of(rounded), x)


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

    Layouts of `pq_fx.kernels.pack`: 4-bit, even channel in the low nibble; int3, CHANNELS/4 bytes
    of magnitudes then CHANNELS/8 bytes of signs; 8-bit, the byte.
    """
    if ELEMENT == "int3":
        magnitude = tl.load(base + channel // 4, mask=mask, other=0).to(tl.int32)
        sign = tl.load(base + CHANNELS // 4 + channel // 8, mask=mask, other=0).to(tl.int32)
        low = (magnitude >> ((channel % 4) * 2)) & 3
        return (low | (((sign >> (channel % 8)) & 1) << 2)).to(tl.uint8)
    elif ELEMENT == "int4" or ELEMENT == "e2m1":
        byte = tl.load(base + channel // 2, mask=mask, other=0).to(tl.int32)
        return ((byte >> ((channel % 2) * 4)) & 15).to(tl.uint8)
    else:
        return tl.load(base + channel, mask=mask, other=0)


@triton.jit
def rotate_row(y, LENGTH: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """Block Hadamard of y [LENGTH] by butterflies, in the order of `reference.rotate`."""
    for i in tl.static_range(LOG_SIZE):
        pairs = tl.reshape(y, [LENGTH // (2 << i), 2, 1 << i])
        a, b = tl.split(tl.permute(pairs, [0, 2, 1]))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [LENGTH])
    return y * (SIZE**-0.5)


@triton.jit
def group_scales(
    groups, amax, global_scale, ELEMENT: tl.constexpr, SCALE: tl.constexpr, TOP: tl.constexpr
):
    """Scale of groups [G, g] with largest magnitudes amax [G]: (stored bits, encoding factors).

    Returns (stored, divisor, inverse, value) as [G] tensors: `stored` the byte of one-byte scales
    and the fp32 value of others, `x / divisor` (or x * inverse where the format is defined so) the
    scaled element, `value` the factor that dequantizes, global scale included.
    """
    if SCALE == "e8m0":
        exponent = tl.maximum(((bits_of(amax) >> 23) & 255) - 2, 0)
        stored = tl.where(amax == amax, exponent, 255)
        value = scale_value(stored, "e8m0")
        divisor = tl.where(value == value, tl.maximum(value, _MIN_NORMAL), value)
        return stored, divisor, tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor), value
    elif SCALE == "e4m3":
        top = tl.full(amax.shape, TOP, tl.float32)
        scale = tl.div_rn(tl.div_rn(amax, top), tl.zeros_like(amax) + global_scale)
        limited = tl.minimum(tl.maximum(scale, _E4M3_TINY), _E4M3_MAX)
        limited = tl.where(scale == scale, limited, scale)
        # Group-level, so the integer form costs nothing and runs on every chip.
        stored = e4m3_byte(limited, False).to(tl.int32)
        divisor = e4m3_value(stored)
        one = tl.full(amax.shape, 1.0, tl.float32)
        inverse = tl.div_rn(tl.div_rn(one, tl.zeros_like(amax) + global_scale), divisor)
        return stored, divisor, inverse, global_scale * divisor
    elif SCALE == "pow2":
        below = float_of(bits_of(amax) & 0x7F800000)
        scale = tl.maximum(below * (0.25 if TOP == 7.0 else 0.5), _SCALE_FLOOR)
        scale = tl.where(scale * TOP < amax, scale * 2.0, scale)
        inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
        # A power of two: its reciprocal is exact, so the product equals the quotient.
        scaled = groups * inverse[:, None]
        full = scaled - clamp_symmetric(round_integer(scaled), TOP)
        doubled = scaled * 2.0
        half = (doubled - clamp_symmetric(round_integer(doubled), TOP)) * 0.5
        # Integers below 2^24: exact in any order of summation.
        full_error = tl.sum(round_integer(full * full * 4096.0), axis=1)
        half_error = tl.sum(round_integer(half * half * 4096.0), axis=1)
        halve = (half_error < full_error) & (scale > _SCALE_FLOOR)
        scale = tl.where(halve, scale * 0.5, scale)
        inverse = tl.where(halve, inverse * 2.0, inverse)
        return scale, scale, inverse, scale
    else:
        scale = tl.div_rn(amax, tl.full(amax.shape, TOP, tl.float32))
        scale = tl.where(scale == scale, tl.maximum(scale, _SCALE_FLOOR), scale)
        if SCALE == "bf16":
            scale = round_bfloat16(scale)
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
    """Element values (fp32, before their scale) that groups [G, g] are rounded to."""
    if SCALE == "e4m3" or SCALE == "e8m0" or SCALE == "pow2":
        # nvfp4 is defined by the product; the other two have powers of two, where it is exact.
        scaled = groups * inverse[:, None]
    else:
        scaled = divide_rounded(groups, divisor[:, None], inverse[:, None])
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
def quantize_row_store(
    y,
    data_ptr,
    scale_ptr,
    global_scale,
    clip_ptr,
    CHANNELS,
    HAS_CLIP: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    LOG_ROTATION: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    GAIN: tl.constexpr,
    CARRIER: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Rotate, quantize and store one row y [LENGTH] (fp32, zeros from CHANNELS on).

    data_ptr: uint8 [CHANNELS] of this row. scale_ptr: this row's scales, CHANNELS / GROUP in the
    storage dtype for CARRIER "codes", one fp32 for "e4m3" (reference.e4m3_operand).
    """
    if ROTATION > 0:
        y = rotate_row(y, LENGTH, ROTATION, LOG_ROTATION)
    groups = tl.reshape(y, [LENGTH // GROUP, GROUP])
    # As integers: the magnitude's order is kept, and NaN is larger than everything, so it
    # propagates.
    amax = float_of(tl.max(bits_of(groups) & 0x7FFFFFFF, axis=1))
    if HAS_CLIP:
        amax = amax * tl.load(clip_ptr)
    stored, divisor, inverse, value = group_scales(groups, amax, global_scale, ELEMENT, SCALE, TOP)
    elements = round_elements(groups, divisor, inverse, ELEMENT, SCALE, TOP, HAS_CLIP)
    index = tl.arange(0, LENGTH // GROUP)
    # Not a reshape of one range: the compiler must see that neighbors are contiguous.
    offsets = index[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if CARRIER == "codes":
        if SCALE == "bf16" or SCALE == "pow2":
            # Already on bf16's lattice: dropping the low half is exact.
            tl.store(scale_ptr + index, stored.to(tl.bfloat16), mask=index * GROUP < CHANNELS)
        elif SCALE == "fp32":
            tl.store(scale_ptr + index, stored, mask=index * GROUP < CHANNELS)
        else:
            tl.store(scale_ptr + index, stored.to(tl.uint8), mask=index * GROUP < CHANNELS)
        tl.store(data_ptr + offsets, element_code(elements, ELEMENT), mask=offsets < CHANNELS)
    else:
        tl.static_assert(CARRIER == "e4m3")
        # Scales are positive or NaN, so their bits order as integers; padding groups do not count.
        largest = float_of(tl.max(tl.where(index * GROUP < CHANNELS, bits_of(value), 0), axis=0))
        row = largest * (1.0 / GAIN)
        row = tl.where(row == row, tl.maximum(row, _ROW_SCALE_FLOOR), row)
        factor = tl.div_rn(value, tl.zeros_like(value) + row)
        data = elements * factor[:, None]
        tl.store(data_ptr + offsets, e4m3_byte(data, NATIVE_FP8), mask=offsets < CHANNELS)
        tl.store(scale_ptr, row)
