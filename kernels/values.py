"""Values of code points and scales, and how a scale meets its elements. Plain PyTorch, traceable.

The lower half of `pq_fx.kernels.reference`: what bytes mean, without how they were chosen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import unpack

E4M3_MAX = 448.0
# Smallest row scale of the "e4m3" carrier.
ROW_SCALE_FLOOR = 2.0**-120


def scale_values(scale: Tensor, fmt: Format, global_scale: Tensor | None = None) -> Tensor:
    """Stored scales as fp32 factors of the elements, global scale multiplied in as torchao does."""
    if fmt.scale == "e8m0":
        wide = scale.to(torch.int32)
        value = (wide << 23).view(torch.float32)
        value = torch.where(wide == 0, 2.0**-127, value)
        return torch.where(wide == 255, math.nan, value)
    value = scale.float()
    return value if global_scale is None else global_scale.float() * value


def element_values(codes: Tensor, fmt: Format) -> Tensor:
    """fp32 values of code points, before their scale. Code points outside the format: undefined."""
    if fmt.element == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    if fmt.element == "int8":
        return codes.view(torch.int8).float()
    if fmt.full_range:
        return codes.float() - fmt.max_value
    sign_bit = 1 << (fmt.bits - 1)
    magnitude = (codes & (sign_bit - 1)).float()
    if fmt.element == "e2m1":  # 0 .5 1 1.5 | 2 3 | 4 6
        magnitude = torch.where(
            magnitude < 4,
            magnitude * 0.5,
            torch.where(magnitude < 6, magnitude - 2.0, magnitude * 2.0 - 8.0),
        )
    return torch.where(codes >= sign_bit, -magnitude, magnitude)


def element_codes(scaled: Tensor, fmt: Format) -> Tensor:
    """Code points uint8 of values in units of their scale: nearest even, saturating."""
    top = fmt.max_value
    if fmt.element == "e2m1":
        return _e2m1_codes(scaled)
    if fmt.element == "e4m3":
        return scaled.clamp(-top, top).to(torch.float8_e4m3fn).view(torch.uint8)
    integer = _integers(scaled, fmt)
    if fmt.full_range:
        return (integer + top).to(torch.uint8)
    if fmt.element == "int8":
        return integer.to(torch.int8).view(torch.uint8)
    sign_bit = float(1 << (fmt.bits - 1))
    # -0.0 < 0 is false, so no code point is a negative zero.
    return (integer.abs() + torch.where(integer < 0, sign_bit, 0.0)).to(torch.uint8)


def nearest_elements(scaled: Tensor, fmt: Format) -> Tensor:
    """``element_values(element_codes(scaled))`` without code points, but for the sign of a zero; NaN stays NaN."""
    top = fmt.max_value
    if fmt.element == "e4m3":
        return scaled.clamp(-top, top).to(torch.float8_e4m3fn).float()
    if fmt.element != "e2m1":
        rounded = scaled.round()
        del scaled  # a GPU holds few copies of a part of a weight
        return rounded.clamp(-top, top - fmt.full_range)
    a = scaled.clamp(-top, top)
    size = a.abs()
    upper = torch.where(size < 4.0, a.round(), (a * 0.5).round() * 2.0)
    return torch.where(size < 2.0, (a * 2.0).round() * 0.5, upper)


def largest(groups: Tensor, fmt: Format) -> Tensor:
    """Largest magnitudes [..., 1] of groups [..., g]; in a full range with their signs, the negative one of equals."""
    if not fmt.full_range:
        return groups.abs().amax(dim=-1, keepdim=True)
    high, low = groups.amax(dim=-1, keepdim=True), groups.amin(dim=-1, keepdim=True)
    return torch.where(high > -low, high, low)


def _integers(scaled: Tensor, fmt: Format) -> Tensor:
    """Nearest even integers of an integer format, saturating."""
    return scaled.round().clamp(-fmt.max_value, fmt.max_value - fmt.full_range)


def _e2m1_codes(scaled: Tensor) -> Tensor:
    """e2m1 code points; negative zeros keep their sign as in torchao."""
    a = scaled.abs().clamp(max=6.0)
    # Steps of the representable values: 0.5 below 2, 1 below 4, 2 above.
    upper = torch.where(a < 4.0, a.round() + 2.0, (a * 0.5).round() + 4.0)
    code = torch.where(a < 2.0, (a * 2.0).round(), upper)
    return (code + torch.where(scaled.signbit(), 8.0, 0.0)).to(torch.uint8)


def packed_values(packed: Tensor, fmt: Format, channels: int) -> Tensor:
    """fp32 values [..., K] of packed rows: ``element_values(unpack(packed))``, by table look-up.

    A look-up of whole bytes is several times faster on a CPU than moving their bits apart, eager
    and compiled (weights are decoded at every call there).
    """
    if fmt.bits == 8:
        return element_values(packed, fmt)
    byte = torch.arange(256, dtype=torch.int32, device=packed.device).to(torch.uint8)
    byte = byte.unsqueeze(-1)
    if fmt.bits == 4:
        return _look_up(packed, element_values(unpack(byte, fmt, 2), fmt))
    magnitude, sign = packed.split([channels // 4, channels // 8], dim=-1)
    two_bits = torch.cat([(byte >> (2 * i)) & 3 for i in range(4)], dim=-1).float()
    signs = torch.cat([(byte >> i) & 1 for i in range(8)], dim=-1).float()
    if fmt.full_range:
        return _look_up(magnitude, two_bits) + _look_up(sign, signs * 4.0 - 4.0)
    return _look_up(magnitude, two_bits) * _look_up(sign, signs * -2.0 + 1.0)


def _look_up(packed: Tensor, table: Tensor) -> Tensor:
    return F.embedding(packed.to(torch.int32), table).flatten(-2)


def apply_scale(values: Tensor, scale: Tensor) -> Tensor:
    """Elements [..., K] times their group's scale [..., G], both fp32."""
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def fold_scale(values: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The "e4m3" carrier: the group scale goes into the fp8 operand, one scale a row stays outside.

    From elements fp32 [..., K] and group scales s fp32 [..., G] (global scale included) to
    (data float8_e4m3fn [..., K], row scale r fp32 [..., 1]) with
    ``r = max(max over the row of |s| / operand_gain, 2^-120)`` and
    ``data = e4m3(element * (s / r))``, nearest even. operand_gain is a power of two, so data is
    exact when every s is a power of two times the largest one (mxfp4, "pow2"; down to 2^-15 of it)
    and for plain fp8 rows, where r = s and data are the codes. For int4, r = max(s * 7) / 448.
    One NaN makes its row NaN.
    """
    row = scale.abs().amax(dim=-1, keepdim=True) * (1.0 / fmt.operand_gain)
    row = row.clamp(min=ROW_SCALE_FLOOR)
    data = apply_scale(values, scale / row).clamp(-E4M3_MAX, E4M3_MAX)
    return data.to(torch.float8_e4m3fn), row


def round_bf16(x: Tensor) -> Tensor:
    """fp32 rounded to bf16's nearest even, kept in fp32.

    By bit moves, because Inductor drops a rounding that only a cast to bf16 and back expresses.
    """
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(x.isnan(), x, rounded.view(torch.float32))


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 rounded to `dtype`'s nearest even (bf16, fp16; fp32 as it is), kept in fp32."""
    if dtype == torch.bfloat16:
        return round_bf16(x)
    if dtype != torch.float16:
        return x
    # By fp32 sums, for the reason above: the magic number pushes the bits to be dropped out.
    a = x.abs()
    exponent = (a.contiguous().view(torch.int32) & 0x7F800000).clamp(
        min=(127 - 14) << 23, max=(127 + 16) << 23
    )
    magic = (exponent + (13 << 23)).view(torch.float32)
    rounded = (a + magic) - magic
    rounded = torch.where(a >= 65520.0, math.inf, rounded)
    return torch.where(x.isnan(), x, rounded.copysign(x))
