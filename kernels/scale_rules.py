"""How a group gets its scale, by its format's rule. Plain PyTorch, traceable; part of `pq_fx.kernels.reference`.

fp32 arithmetic in a stated order, as there. A group whose largest magnitude is NaN gets a scale that makes all of its
elements NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.values import E4M3_MAX, nearest_elements, round_bf16, scale_values

# Smallest scale of integers and fp8: zero groups divide by it instead of by zero, and it
# keeps scales and their quotients away from fp32's subnormals, which some devices flush.
SCALE_FLOOR = 2.0**-100
# Smallest nvfp4 group scale: e4m3's smallest normal number, as torchao and ModelOpt clamp it.
E4M3_TINY = 2.0**-6


def nvfp4_global_scale(amax: Tensor) -> Tensor:
    """Per-tensor scale fp32 of nvfp4 from the tensor's largest magnitude: amax / (448 * 6).

    Kept above 2^-100 so that an all-zero tensor does not divide by zero.
    """
    return _divide(amax.float(), E4M3_MAX * 6.0).clamp(min=SCALE_FLOOR)


def _divide(x: Tensor, divisor: float) -> Tensor:
    # True division: eager CUDA multiplies by the reciprocal when the divisor is a Python number.
    return x / torch.full((), divisor, dtype=torch.float32, device=x.device)


def group_scale(groups: Tensor, amax: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """Stored scales [..., G, 1] from groups fp32 [..., G, g] and their amax [..., G, 1]."""
    if fmt.scale == "e8m0":
        # OCP MX v1.0 section 6.3: floor(log2(amax)) - 2, 2 being e2m1's largest exponent.
        exponent = ((amax.contiguous().view(torch.int32) >> 23) & 255) - 2
        return torch.where(amax.isnan(), 255, exponent.clamp(min=0)).to(torch.uint8)
    if fmt.two_level:
        scale = _divide(amax, fmt.max_value)
        if global_scale is not None:
            scale = scale / global_scale.float()
        if fmt.scale == "4over6":
            return _four_over_six(groups, scale, fmt, global_scale)
        return _e4m3_scale(scale)
    if fmt.scale == "pow2":
        return _pow2_scale(groups, amax, fmt)
    if fmt.full_range:
        # The element of largest magnitude comes to lie on -max_value.
        scale = _divide(amax, -fmt.max_value)
        return round_bf16(torch.where(scale.abs() < SCALE_FLOOR, SCALE_FLOOR, scale)).bfloat16()
    scale = _divide(amax, fmt.max_value).clamp(min=SCALE_FLOOR)
    return round_bf16(scale).to(torch.bfloat16) if fmt.scale == "bf16" else scale


def _e4m3_scale(scale: Tensor) -> Tensor:
    return scale.clamp(min=E4M3_TINY, max=E4M3_MAX).to(torch.float8_e4m3fn)


def _four_over_six(
    groups: Tensor, scale: Tensor, fmt: Format, global_scale: Tensor | None
) -> Tensor:
    """`scale` fp32, which puts the largest element on 6, or 1.5 times that where it has less squared error: the largest
    element comes to lie on 4, and e2m1 has nothing between the two.

    Errors are counted in 1/64 of an element: sums of integers, exact in any order of summation.
    """
    six, four = _e4m3_scale(scale), _e4m3_scale(scale * 1.5)
    errors = []
    for tried in (six, four):
        scaled = scaled_groups(groups, tried, fmt, global_scale)
        lost = ((scaled.abs() - nearest_elements(scaled, fmt).abs()) * 64.0).round()
        errors.append((lost * lost).sum(dim=-1, keepdim=True) * tried.float().square())
    chosen = torch.where(errors[1] < errors[0], four.float(), six.float())
    return chosen.to(torch.float8_e4m3fn)


def _pow2_scale(groups: Tensor, amax: Tensor, fmt: Format) -> Tensor:
    """The smallest power of two >= amax / max_value, or its half where that has less error.

    Compared are sums of round((x / s - q)^2 * 2^12), s the larger scale: integers below 2^24 for
    groups up to 128, so the sums are exact in any order of summation.
    """
    floor_exponent = math.floor(math.log2(fmt.max_value))
    below = (amax.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = (below * 2.0**-floor_exponent).clamp(min=SCALE_FLOOR)
    scale = torch.where(scale * fmt.max_value < amax, scale * 2.0, scale)
    scaled = groups / scale
    top = fmt.max_value
    full = scaled - scaled.round().clamp(-top, top)
    doubled = scaled * 2.0
    half = (doubled - doubled.round().clamp(-top, top)) * 0.5
    full_error = (full * full * 4096.0).round().sum(dim=-1, keepdim=True)
    half_error = (half * half * 4096.0).round().sum(dim=-1, keepdim=True)
    better = (half_error < full_error) & (scale > SCALE_FLOOR)
    return torch.where(better, scale * 0.5, scale).to(torch.bfloat16)


def scaled_groups(
    groups: Tensor, scale: Tensor, fmt: Format, global_scale: Tensor | None
) -> Tensor:
    """Groups [..., G, g] in units of their stored scales [..., G, 1]."""
    if fmt.element != "e2m1":
        return groups / scale.float()
    if not fmt.two_level:
        return groups / scale_values(scale, fmt).clamp(min=2.0**-126)
    one = torch.ones((), dtype=torch.float32, device=groups.device)
    # A product with the reciprocal, in torchao's order: (1 / global) / scale.
    numerator = one if global_scale is None else one / global_scale.float()
    return groups * (numerator / scale.float())
