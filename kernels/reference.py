"""Plain-PyTorch definition of every format and op of pq_fx: quantize, dequantize, rotate, carriers.

Any device; all arithmetic in fp32 from the input's dtype, every step a correctly rounded operation
in a stated order, so that a kernel can agree bit for bit. The functions are traceable (no data
dependent Python, symbolic row counts): Inductor compiles them on a CPU as the ops' decompositions.

A group that holds NaN or infinity is not finite in any element after dequantize, in every format
(nvfp4 would else make its largest number of an infinity); so they reach the model's output, as in
the float model. Norms, activations and the linear ops are in `reference_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pq_fx.errors import FormatError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.values import (
    E4M3_MAX,
    ROW_SCALE_FLOOR,
    apply_scale,
    element_codes,
    element_values,
    fold_scale,
    largest,
    nearest_elements,
    round_bf16,
    scale_values,
)

# Smallest scale of integers and fp8: zero groups divide by it instead of by zero, and it
# keeps scales and their quotients away from fp32's subnormals, which some devices flush.
SCALE_FLOOR = 2.0**-100
# Smallest nvfp4 group scale: e4m3's smallest normal number, as torchao and ModelOpt clamp it.
E4M3_TINY = 2.0**-6
# Clip ratios worth trying for weights; 1.5 for nvfp4 is amax/4 next to amax/6.
WEIGHT_CLIP_RATIOS: tuple[float, ...] = tuple(1.0 - 0.03 * i for i in range(16))
NVFP4_CLIP_RATIOS: tuple[float, ...] = (1.0, 1.5)

__all__ = [
    "E4M3_MAX",
    "E4M3_TINY",
    "NVFP4_CLIP_RATIOS",
    "ROW_SCALE_FLOOR",
    "SCALE_FLOOR",
    "WEIGHT_CLIP_RATIOS",
    "Quantized",
    "at_scales",
    "dequantize",
    "e4m3_operand",
    "element_values",
    "fake_quantize",
    "group_scales",
    "nvfp4_global_scale",
    "permute_rotate",
    "quantize",
    "rotate",
    "round_bf16",
    "scale_values",
]


class Quantized(NamedTuple):
    """A quantized tensor, not packed.

    Attributes:
        codes: uint8 [..., K] code points (see `pq_fx.kernels.formats`).
        scale: [..., K / group] in its storage dtype: bf16 for "bf16" and "pow2", float8_e4m3fn for
            "e4m3", uint8 exponents for "e8m0" (value 2^(byte - 127), 255 is NaN), fp32 for "fp32".
        global_scale: fp32 [] that multiplies every nvfp4 scale, or None (counts as 1).
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None


def nvfp4_global_scale(amax: Tensor) -> Tensor:
    """Per-tensor scale fp32 of nvfp4 from the tensor's largest magnitude: amax / (448 * 6).

    Kept above 2^-100 so that an all-zero tensor does not divide by zero.
    """
    return _divide(amax.float(), E4M3_MAX * 6.0).clamp(min=SCALE_FLOOR)


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    global_scale: Tensor | None = None,
    scale_search: Sequence[float] = (),
    clip: Tensor | None = None,
) -> Quantized:
    """Quantize the last axis of `x` [..., K] by groups.

    Args:
        x: float tensor (16 or 32 bit), any leading shape, also empty.
        fmt: the format; K must be a multiple of its group.
        global_scale: fp32 [], nvfp4 only: two-level scaling (`nvfp4_global_scale`).
        scale_search: ratios; the scale is computed from ratio * amax for each, and per group the
            one with the least squared error is kept, the first of equals. Empty: ratio 1 alone.
        clip: fp32 [], multiplies every group's amax; elements beyond saturate. None = 1.

    Raises:
        FormatError: K is not a multiple of the group, or a global scale for another format.
    """
    groups, amax = _groups(x, fmt, global_scale, clip)
    if len(scale_search) == 0:
        scale = _group_scale(groups, amax, fmt, global_scale)
        codes = element_codes(_scaled(groups, scale, fmt, global_scale), fmt)
    else:
        codes, scale = _search(groups, amax, fmt, global_scale, scale_search)
    return Quantized(codes.flatten(-2), scale.squeeze(-1), global_scale)


def dequantize(q: Quantized, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., K]: element * (scale * global scale), computed in fp32, returned in `dtype`."""
    scale = scale_values(q.scale, fmt, q.global_scale)
    return apply_scale(element_values(q.codes, fmt), scale).to(dtype)


def fake_quantize(
    x: Tensor,
    fmt: Format,
    *,
    global_scale: Tensor | None = None,
    scale_search: Sequence[float] = (),
    clip: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize: `x` as its format represents it, in x's dtype."""
    if len(scale_search) == 0:
        scale = group_scales(x, fmt, global_scale, clip)
        return at_scales(x, scale, fmt, global_scale).to(x.dtype)
    q = quantize(x, fmt, global_scale=global_scale, scale_search=scale_search, clip=clip)
    return dequantize(q, fmt, x.dtype)


def group_scales(
    x: Tensor, fmt: Format, global_scale: Tensor | None = None, clip: Tensor | None = None
) -> Tensor:
    """The scales [..., G] that `quantize` stores for x [..., K]."""
    groups, amax = _groups(x, fmt, global_scale, clip)
    return _group_scale(groups, amax, fmt, global_scale).squeeze(-1)


def at_scales(x: Tensor, scale: Tensor, fmt: Format, global_scale: Tensor | None = None) -> Tensor:
    """x [..., K] as its format represents it with stored scales [..., G], fp32: half the operations of `quantize` and
    `dequantize`, since no code points are made on the way (a zero's sign may differ)."""
    scale = scale.unsqueeze(-1)
    groups = x.float().unflatten(-1, (scale.shape[-2], -1))
    elements = nearest_elements(_scaled(groups, scale, fmt, global_scale), fmt)
    return (elements * scale_values(scale, fmt, global_scale)).flatten(-2)


def _groups(
    x: Tensor, fmt: Format, global_scale: Tensor | None, clip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x as groups fp32 [..., G, g], and their `largest` [..., G, 1], NaN for an infinity."""
    channels = x.shape[-1]
    fmt.check_channels(channels)
    if global_scale is not None and not fmt.two_level:
        raise FormatError(f"{fmt.key} has no global scale; only nvfp4 has two-level scaling")
    groups = x.float().unflatten(-1, (fmt.groups(channels), fmt.group_size or channels))
    amax = largest(groups, fmt)
    amax = torch.where(amax.isinf(), math.nan, amax)
    return groups, amax if clip is None else amax * clip.float()


def e4m3_operand(q: Quantized, fmt: Format) -> tuple[Tensor, Tensor]:
    """The "e4m3" carrier of a quantized tensor: (float8_e4m3fn [..., K], row scale fp32 [..., 1]).

    The group scale lies inside the fp8 operand; see `pq_fx.kernels.values.fold_scale`.
    """
    scale = scale_values(q.scale, fmt, q.global_scale)
    return fold_scale(element_values(q.codes, fmt), scale, fmt)


def rotate(x: Tensor, size: int) -> Tensor:
    """Multiply every `size` contiguous channels by H / sqrt(size), H Sylvester-Hadamard; 0 = x.

    Computed as a butterfly in fp32 (strides 1, 2, 4, ..., each stage (a + b, a - b)), then one
    product with 1 / sqrt(size): the order is part of the definition, so kernels agree bit for bit.
    fp64 stays fp64; for size > 0 other dtypes give fp32. H is symmetric: its own inverse.

    Raises:
        FormatError: size is not a power of two that divides K.
    """
    if size == 0:
        return x
    if size & (size - 1) or size < 0 or x.shape[-1] % size:
        raise FormatError(
            f"rotation size {size} is not a power of two that divides K={x.shape[-1]}; "
            "use the group size, or 0 for none"
        )
    y = x if x.dtype == torch.float64 else x.float()
    stride = 1
    while stride < size:
        # Axis -2 tells the partners apart, axis -1 the position inside the stride. Two stages at a
        # time where they fit: the same sums with half the passes over memory.
        radix = 4 if size // stride >= 4 else 2
        parts = y.unflatten(-1, (-1, radix, stride)).unbind(-2)
        if radix == 4:
            a, b = parts[0] + parts[1], parts[0] - parts[1]
            c, d = parts[2] + parts[3], parts[2] - parts[3]
            parts = (a + c, b + d, a - c, b - d)
        else:
            parts = (parts[0] + parts[1], parts[0] - parts[1])
        y = torch.stack(parts, dim=-2).flatten(-3)
        stride *= radix
    return y * (1.0 / math.sqrt(size))


def permute_rotate(x: Tensor, perm: Tensor | None, size: int) -> Tensor:
    """``rotate(x[..., perm], size)``; perm int32 or int64 [K], None = identity."""
    if perm is not None:
        x = x.index_select(-1, perm)
    return rotate(x, size)


def _divide(x: Tensor, divisor: float) -> Tensor:
    # True division: eager CUDA multiplies by the reciprocal when the divisor is a Python number.
    return x / torch.full((), divisor, dtype=torch.float32, device=x.device)


def _group_scale(groups: Tensor, amax: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
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
        scaled = _scaled(groups, tried, fmt, global_scale)
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


def _scaled(groups: Tensor, scale: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """Groups [..., G, g] in units of their stored scales [..., G, 1]."""
    if fmt.element != "e2m1":
        return groups / scale.float()
    if not fmt.two_level:
        return groups / scale_values(scale, fmt).clamp(min=2.0**-126)
    one = torch.ones((), dtype=torch.float32, device=groups.device)
    # A product with the reciprocal, in torchao's order: (1 / global) / scale.
    numerator = one if global_scale is None else one / global_scale.float()
    return groups * (numerator / scale.float())


def _search(
    groups: Tensor,
    amax: Tensor,
    fmt: Format,
    global_scale: Tensor | None,
    ratios: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Codes and scales of the best ratio of each group; memory of two candidates, not of all."""
    best_codes = best_scale = best_error = None
    for ratio in ratios:
        clipped = amax * ratio
        scale = _group_scale(groups, clipped, fmt, global_scale)
        codes = element_codes(_scaled(groups, scale, fmt, global_scale), fmt)
        values = element_values(codes, fmt) * scale_values(scale, fmt, global_scale)
        error = (values - groups).square().sum(dim=-1, keepdim=True)
        if best_codes is None or best_scale is None or best_error is None:
            best_codes, best_scale, best_error = codes, scale, error
            continue
        better = error < best_error
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    if best_codes is None or best_scale is None:
        raise FormatError("scale_search is empty; pass at least one ratio")
    return best_codes, best_scale
