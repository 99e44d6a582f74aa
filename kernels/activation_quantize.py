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
    perm_ptr,
    global_ptr,
    data_ptr,
    scale_ptr,
    CHANNELS,
    x_inner,
    x_outer_stride,
    x_stride,
    gate_inner,
    gate_outer_stride,
    gate_stride,
    scale_stride,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PERM: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
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
    """x, gate [M, K], strided rows; data uint8 [M, K]; scale [M, K / GROUP] or fp32 [M, 1]."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // x_inner) * x_outer_stride + (row % x_inner) * x_stride
    gate_ptr += (row // gate_inner) * gate_outer_stride + (row % gate_inner) * gate_stride
    offsets = tl.arange(0, LENGTH)
    mask = offsets < CHANNELS
    source = offsets
    if HAS_PERM:
        source = tl.load(perm_ptr + offsets, mask=mask, other=0)
        source = tl.where(mask, source, offsets)
    read = offsets if ON_CHIP else source
    x = tl.load(x_ptr + read, mask=mask, other=0.0).to(tl.float32)
    y = activation(x, ACT)
    if HAS_GATE:
        y = y * tl.load(gate_ptr + read, mask=mask, other=0.0).to(tl.float32)
    if HAS_PERM and ON_CHIP:
        y = tl.gather(y, source, 0)
    global_scale = 1.0
    if HAS_GLOBAL:
        global_scale = tl.load(global_ptr).to(tl.float32)
    quantize_row_store(
        y,
        data_ptr + row * CHANNELS,
        scale_ptr + row * scale_stride,
        global_scale,
        CHANNELS,
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


def quantized_outputs(x: Tensor, fmt: Format, carrier: str) -> tuple[Tensor, Tensor]:
    """Empty (data, scale) of a quantize op on x [..., K], in the carrier's dtypes and shapes."""
    lead, channels = x.shape[:-1], x.shape[-1]
    if carrier == "e4m3":
        return (
            torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
            torch.empty((*lead, 1), dtype=torch.float32, device=x.device),
        )
    return (
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
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
    x: Tensor, perm: Tensor | None, global_scale: Tensor | None, fmt: Format, rotation: int
) -> None:
    """Raise KernelError or FormatError unless x fits format, rotation and permutation."""
    channels = x.shape[-1]
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


def act_quantize(
    x: Tensor,
    gate: Tensor | None,
    act: str,
    perm: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
    *,
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch ``act(x) * gate``, gather, rotate, quantize (see `reference_ops.act_quantize`).

    on_chip: gather with `tl.gather` instead of gathered loads (None: loads). Rows may be strided.

    Raises:
        KernelError: shapes, dtypes or devices do not fit.
        FormatError: K does not fit the format or the rotation.
    """
    check_choice("act", act, ACTIVATIONS)
    check_choice("carrier", carrier, CARRIERS)
    fmt = Format.parse(format)
    check_quantize(x, perm, global_scale, fmt, rotation)
    if gate is not None:
        require(
            gate.shape == x.shape and gate.device == x.device,
            f"gate {tuple(gate.shape)} on {gate.device} must match "
            f"x {tuple(x.shape)} on {x.device}",
        )
    data, scale = quantized_outputs(x, fmt, carrier)
    if x.numel() == 0:
        return data, scale
    rows = as_rows(x, "x")
    gates = rows if gate is None else as_rows(gate, "gate")
    length = padded_length(x.shape[-1])
    with on_device_of(x):
        launch(_act_quantize_kernel)[(rows.count,)](
            rows.tensor,
            gates.tensor,
            x if perm is None else perm,
            x if global_scale is None else global_scale,
            data.view(torch.uint8),
            storage_bytes(scale),
            x.shape[-1],
            rows.inner,
            rows.outer_stride,
            rows.stride,
            gates.inner,
            gates.outer_stride,
            gates.stride,
            scale.shape[-1],
            ACT=act,
            HAS_GATE=gate is not None,
            HAS_PERM=perm is not None,
            HAS_GLOBAL=global_scale is not None,
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
    format: str,
    rotation: int,
    carrier: str,
    *,
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch gather, rotate, quantize; arguments and errors as `reference_ops.quantize`."""
    return act_quantize(
        x, None, "none", perm, global_scale, format, rotation, carrier, on_chip=on_chip
    )
