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
from pq_fx.kernels.scale_rules import group_scale, nvfp4_global_scale, scaled_groups
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

# Clip ratios worth trying for weights; 1.5 for nvfp4 is amax/4 next to amax/6.
WEIGHT_CLIP_RATIOS: tuple[float, ...] = tuple(1.0 - 0.03 * i for i in range(16))
NVFP4_CLIP_RATIOS: tuple[float, ...] = (1.0, 1.5)

__all__ = [
    "E4M3_MAX",
    "NVFP4_CLIP_RATIOS",
    "ROW_SCALE_FLOOR",
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
        scale = group_scale(groups, amax, fmt, global_scale)
        codes = element_codes(scaled_groups(groups, scale, fmt, global_scale), fmt)
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
    return group_scale(groups, amax, fmt, global_scale).squeeze(-1)


def at_scales(x: Tensor, scale: Tensor, fmt: Format, global_scale: Tensor | None = None) -> Tensor:
    """x [..., K] as its format represents it with stored scales [..., G], fp32: half the operations of `quantize` and
    `dequantize`, since no code points are made on the way (a zero's sign may differ)."""
    scale = scale.unsqueeze(-1)
    groups = x.float().unflatten(-1, (scale.shape[-2], -1))
    elements = nearest_elements(scaled_groups(groups, scale, fmt, global_scale), fmt)
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
        scale = group_scale(groups, clipped, fmt, global_scale)
        codes = element_codes(scaled_groups(groups, scale, fmt, global_scale), fmt)
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
