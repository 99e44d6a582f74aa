"""Triton: activation function, gate, channel gather, rotation and group quantize in one kernel.

One program a row [K]: the row is read once, everything else happens on chip. The permutation is a
gather of the input (global memory, served by L1, or on chip with `tl.gather`); K is padded to the
next power of two by masks. Defined by `pq_fx.kernels.reference_ops.act_quantize`: given equal fp32
values the codes and scales are equal byte for byte; transcendental functions may differ by an ulp
and then move a code by one step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import launch
from pq_fx.kernels.reference_ops import ACTIVATIONS, CARRIERS, check_choice
from pq_fx.kernels.triton_common import (
    as_bytes,
    as_rows,
    check_perm,
    check_rotation,
    native_fp8,
    on_device_of,
    padded_length,
    quantize_row_store,
    require,
    row_warps,
    scale_dtype,
    storage_bytes,
)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """The activation function of fp32 x."""
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(u) = 1 - 2 / (exp(2u) + 1): right at both ends, where exp is 0 or inf.
        return 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    elif ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "relu":
        return tl.where(x > 0, x, tl.where(x == x, 0.0, x))
    else:
        tl.static_assert(ACT == "none")
        return x


@triton.jit
def _act_quantize_kernel(
    x_ptr,
    gate_ptr,
    before_ptr,
    perm_ptr,
    global_ptr,
    clip_ptr,
    data_ptr,
    scale_ptr,
    CHANNELS,
    x_inner,
    x_outer_stride,
    x_stride,
    gate_inner,
    gate_outer_stride,
    gate_stride,
    before_inner,
    before_outer_stride,
    before_stride,
    BEFORE,
    scale_stride,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
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
    """x, gate [M, K - BEFORE], before [M, BEFORE], strided rows, K = CHANNELS.

    data uint8 [M, K]; scale [M, K / GROUP] or fp32 [M, 1].
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // x_inner) * x_outer_stride + (row % x_inner) * x_stride
    if HAS_GATE:
        gate_ptr += (row // gate_inner) * gate_outer_stride + (row % gate_inner) * gate_stride
    offsets = tl.arange(0, LENGTH)
    mask = offsets < CHANNELS
    source = offsets
    if HAS_PERM:
        source = tl.load(perm_ptr + offsets, mask=mask, other=0)
        source = tl.where(mask, source, offsets)
    read = offsets if ON_CHIP else source
    own = mask
    if HAS_BEFORE:
        own = mask & (read >= BEFORE)
        before_ptr += (row // before_inner) * before_outer_stride
        before_ptr += (row % before_inner) * before_stride
        first = tl.load(before_ptr + read, mask=read < BEFORE, other=0.0).to(tl.float32)
        x_ptr -= BEFORE
        if HAS_GATE:
            gate_ptr -= BEFORE
    x = tl.load(x_ptr + read, mask=own, other=0.0).to(tl.float32)
    y = activation(x, ACT)
    if HAS_GATE:
        y = y * tl.load(gate_ptr + read, mask=own, other=0.0).to(tl.float32)
    if HAS_BEFORE:
        y = tl.where(read < BEFORE, first, y)
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


def quantized_outputs(x: Tensor, channels: int, fmt: Format, carrier: str) -> tuple[Tensor, Tensor]:
    """Empty (data, scale) of a quantize op: x's leading axes, K = `channels`, as the carrier has it."""
    lead = x.shape[:-1]
    if carrier == "e4m3":
        return (
            torch.empty((*lead, channels), dtype=torch.float8_e4m3fn, device=x.device),
            torch.empty((*lead, 1), dtype=torch.float32, device=x.device),
        )
    return (
        torch.empty((*lead, channels), dtype=torch.uint8, device=x.device),
        torch.empty((*lead, fmt.groups(channels)), dtype=scale_dtype(fmt), device=x.device),
    )


def format_constants(fmt: Format, length: int, rotation: int, carrier: str) -> dict[str, object]:
    """The constexpr arguments of `quantize_row_store` that a format and a row length determine."""
    return {
        "LENGTH": length,
        "GROUP": fmt.group_size or length,
        "ROTATION": rotation,
        "LOG_ROTATION": max(rotation.bit_length() - 1, 0),
        "ELEMENT": fmt.element,
        "SCALE": fmt.scale,
        "TOP": fmt.max_value,
        "GAIN": float(fmt.operand_gain),
        "CARRIER": carrier,
    }


def check_quantize(
    x: Tensor,
    channels: int,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    fmt: Format,
    rotation: int,
) -> None:
    """Raise KernelError or FormatError unless rows of K = `channels` made of x can be quantized."""
    fmt.check_channels(channels)
    check_rotation(rotation, channels)
    check_perm(perm, channels, x.device)
    require(
        x.dtype in (torch.float16, torch.bfloat16, torch.float32),
        f"x must be float16, bfloat16 or float32, got {x.dtype}",
    )
    if global_scale is not None:
        require(
            fmt.two_level and global_scale.numel() == 1,
            f"a global scale is one number and only for nvfp4; got shape "
            f"{tuple(global_scale.shape)} for {fmt.key}",
        )
    if clip is not None:
        require(
            clip.dtype == torch.float32 and clip.numel() == 1 and clip.device == x.device,
            f"clip must be one float32 number on {x.device}; got {clip.dtype} "
            f"{tuple(clip.shape)} on {clip.device}",
        )


def act_quantize(
    x: Tensor,
    gate: Tensor | None,
    act: str,
    before: Tensor | None,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
    *,
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch ``cat([before, act(x) * gate])``, gather, rotate, quantize (see `reference_ops.act_quantize`).

    on_chip: gather with `tl.gather` instead of gathered loads (None: loads). Rows may be strided.

    Raises:
        KernelError: shapes, dtypes or devices do not fit.
        FormatError: K does not fit the format or the rotation.
    """
    check_choice("act", act, ACTIVATIONS)
    check_choice("carrier", carrier, CARRIERS)
    fmt = Format.parse(format)
    channels = x.shape[-1] + (0 if before is None else before.shape[-1])
    check_quantize(x, channels, perm, global_scale, clip, fmt, rotation)
    if before is not None:
        require(
            before.shape[:-1] == x.shape[:-1] and before.device == x.device,
            f"before {tuple(before.shape)} on {before.device} must match x {tuple(x.shape)} on "
            f"{x.device} but for its last axis",
        )
    if gate is not None:
        require(
            gate.shape == x.shape and gate.device == x.device,
            f"gate {tuple(gate.shape)} on {gate.device} must match "
            f"x {tuple(x.shape)} on {x.device}",
        )
    data, scale = quantized_outputs(x, channels, fmt, carrier)
    if data.numel() == 0:
        return data, scale
    rows = as_rows(x, "x")
    gates = rows if gate is None else as_rows(gate, "gate")
    firsts = rows if before is None else as_rows(before, "before")
    length = padded_length(channels)
    with on_device_of(x):
        launch(_act_quantize_kernel)[(rows.count,)](
            rows.tensor,
            None if gate is None else gates.tensor,
            None if before is None else firsts.tensor,
            perm,
            global_scale,
            clip,
            storage_bytes(data),
            storage_bytes(scale),
            channels,
            rows.inner,
            rows.outer_stride,
            rows.stride,
            gates.inner,
            gates.outer_stride,
            gates.stride,
            firsts.inner,
            firsts.outer_stride,
            firsts.stride,
            0 if before is None else before.shape[-1],
            scale.shape[-1],
            ACT=act,
            HAS_GATE=gate is not None,
            HAS_BEFORE=before is not None,
            HAS_PERM=perm is not None,
            HAS_GLOBAL=global_scale is not None,
            HAS_CLIP=clip is not None,
            ON_CHIP=bool(on_chip),
            NATIVE_FP8=native_fp8(x.device),
            num_warps=row_warps(length),
            enable_fp_fusion=False,
            **format_constants(fmt, length, rotation, carrier),
        )
    return data, scale


def quantize(
    x: Tensor,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
    *,
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch gather, rotate, quantize; arguments and errors as `reference_ops.quantize`."""
    return act_quantize(
        x, None, "none", None, perm, global_scale, clip, format, rotation, carrier, on_chip=on_chip
    )
