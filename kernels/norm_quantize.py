"""Triton: layer or RMS norm, affine, modulation, channel gather, rotation, quantize in one kernel.

One program a row [K], read once; mean and variance in fp32 over the row on chip. The normalized row
is gathered on chip (`tl.gather`), or, as the alternative, the row and its factors are read a second
time in permuted order (both from L1). Defined by `pq_fx.kernels.reference_ops.norm_quantize`; the
sums of a norm have another order here, so a code may move by one step where a value lies on a
boundary (tests/thresholds.py states how many); everything after the norm agrees byte for byte.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.activation_quantize import (
    check_quantize,
    format_constants,
    quantized_outputs,
)
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import launch
from pq_fx.kernels.reference_ops import CARRIERS, NORMS, check_choice
from pq_fx.kernels.triton_common import (
    as_bytes,
    as_rows,
    native_fp8,
    on_device_of,
    padded_length,
    quantize_row_store,
    require,
    row_warps,
    storage_bytes,
)


@triton.jit
def _affine(
    y,
    read,
    mask,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """``(y * weight + bias) * (1 + scale) + shift``, each [K] and read at `read`."""
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + read, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + read, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y = y * (tl.load(scale_ptr + read, mask=mask, other=0.0).to(tl.float32) + 1.0)
    if HAS_SHIFT:
        y = y + tl.load(shift_ptr + read, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mod_scale_ptr,
    mod_shift_ptr,
    perm_ptr,
    global_ptr,
    clip_ptr,
    data_ptr,
    scale_ptr,
    CHANNELS,
    eps,
    x_inner,
    x_outer_stride,
    x_stride,
    mod_rows,
    mod_scale_stride,
    mod_shift_stride,
    scale_stride,
    RMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_PERM: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    ON_CHIP: tl.constexpr,
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
    """x [M, K]; weight, bias [K]; mod_* rows [K], one for every `mod_rows` rows of x.

    data uint8 [M, K]; scale [M, K / GROUP] in its storage dtype, or fp32 [M, 1] (CARRIER "e4m3").
    """
    eps = eps.to(tl.float32)  # Inductor passes floats in double
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // x_inner) * x_outer_stride + (row % x_inner) * x_stride
    if HAS_SCALE:
        mod_scale_ptr += (row // mod_rows) * mod_scale_stride
    if HAS_SHIFT:
        mod_shift_ptr += (row // mod_rows) * mod_shift_stride
    offsets = tl.arange(0, LENGTH)
    mask = offsets < CHANNELS
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = 0.0
    if not RMS:
        mean = tl.sum(x, axis=0) / CHANNELS
        x = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(x * x, axis=0) / CHANNELS
    inverse_deviation = 1.0 / tl.sqrt(variance + eps)
    source = offsets
    if HAS_PERM:
        source = tl.load(perm_ptr + offsets, mask=mask, other=0)
        source = tl.where(mask, source, offsets)
    read = offsets if ON_CHIP else source
    if HAS_PERM and not ON_CHIP:
        x = tl.where(mask, tl.load(x_ptr + read, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)
    y = _affine(
        x * inverse_deviation,
        read,
        mask,
        weight_ptr,
        bias_ptr,
        mod_scale_ptr,
        mod_shift_ptr,
        HAS_WEIGHT,
        HAS_BIAS,
        HAS_SCALE,
        HAS_SHIFT,
    )
    if HAS_PERM and ON_CHIP:
        y = tl.gather(y, source, 0)
    global_scale = 1.0
    if HAS_GLOBAL:
        global_scale = tl.load(global_ptr).to(tl.float32)
    quantize_row_store(
        y,
        as_bytes(data_ptr) + row * CHANNELS,
        scale_ptr + row * scale_stride,
        global_scale,
        clip_ptr,
        CHANNELS,
        HAS_CLIP,
        LENGTH,
        GROUP,
        ROTATION,
        LOG_ROTATION,
        ELEMENT,
        SCALE,
        TOP,
        GAIN,
        CARRIER,
        NATIVE_FP8,
    )


class _Modulation(NamedTuple):
    """Modulation rows: tensor with unit channel stride or None, and how far apart its rows lie."""

    tensor: Tensor | None
    stride: int


def _modulation(mod: Tensor | None, x: Tensor, name: str) -> _Modulation:
    """Rows [B, K] of a modulation [B, K], [B, 1, K] or [K] for x [B, ..., K]."""
    if mod is None:
        return _Modulation(None, 0)
    channels = x.shape[-1]
    require(
        mod.shape[-1] == channels and mod.device == x.device,
        f"{name} {tuple(mod.shape)} on {mod.device} does not fit x {tuple(x.shape)} on {x.device}",
    )
    batch = mod.shape[0] if mod.dim() > 1 else 1
    expected = x.shape[0] if x.dim() > 1 else 1
    require(
        mod.numel() == batch * channels and batch in (1, expected),
        f"{name} {tuple(mod.shape)} must be [B, K] or [B, 1, K] with B = {expected} or 1: one row "
        "for all tokens of a batch entry",
    )
    if mod.stride(-1) != 1:
        mod = mod.contiguous()
    return _Modulation(mod, mod.stride(0) if batch > 1 else 0)


def _vector(vector: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    if vector is None:
        return None
    require(
        tuple(vector.shape) == (x.shape[-1],) and vector.device == x.device,
        f"{name} {tuple(vector.shape)} on {vector.device} must be ({x.shape[-1]},) on {x.device}",
    )
    return vector.contiguous()


def norm_quantize(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
    *,
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch norm, modulation, gather, rotate, quantize (see `reference_ops.norm_quantize`).

    on_chip: gather the normalized row with `tl.gather` (the default) or read it again permuted.

    Raises:
        KernelError: shapes, dtypes or devices do not fit.
        FormatError: K does not fit the format or the rotation.
    """
    check_choice("norm", norm, NORMS)
    check_choice("carrier", carrier, CARRIERS)
    fmt = Format.parse(format)
    check_quantize(x, x.shape[-1], perm, global_scale, clip, fmt, rotation)
    data, scale = quantized_outputs(x, x.shape[-1], fmt, carrier)
    if x.numel() == 0:
        return data, scale
    rows = as_rows(x, "x")
    scales = _modulation(mod_scale, x, "mod_scale")
    shifts = _modulation(mod_shift, x, "mod_shift")
    length = padded_length(x.shape[-1])
    with on_device_of(x):
        launch(_norm_quantize_kernel)[(rows.count,)](
            rows.tensor,
            _vector(weight, x, "weight"),
            _vector(bias, x, "bias"),
            scales.tensor,
            shifts.tensor,
            perm,
            global_scale,
            clip,
            storage_bytes(data),
            storage_bytes(scale),
            x.shape[-1],
            eps,
            rows.inner,
            rows.outer_stride,
            rows.stride,
            rows.count // x.shape[0] if x.dim() > 1 else 1,
            scales.stride,
            shifts.stride,
            scale.shape[-1],
            RMS=norm == "rms",
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=mod_scale is not None,
            HAS_SHIFT=mod_shift is not None,
            HAS_PERM=perm is not None,
            HAS_GLOBAL=global_scale is not None,
            HAS_CLIP=clip is not None,
            ON_CHIP=on_chip is None or on_chip,
            NATIVE_FP8=native_fp8(x.device),
            num_warps=row_warps(length),
            enable_fp_fusion=False,
            **format_constants(fmt, length, rotation, carrier),
        )
    return data, scale
