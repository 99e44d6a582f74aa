"""Triton: activation function, gate, channel gather, rotation and group quantize in one kernel.

A program holds a few rows [K]: they are read once, everything else happens on chip. A permutation
is a gather on chip of what is quantized. Defined by `pq_fx.kernels.reference_ops.act_quantize`: given equal fp32
values the codes and scales are equal byte for byte; transcendental functions may differ by an ulp
and then move a code by one step.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.carriers import check_carrier
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import launch
from pq_fx.kernels.quantize_row import quantize_rows_store
from pq_fx.kernels.reference_ops import ACTIVATIONS, check_choice
from pq_fx.kernels.rotate_row import gather_rows
from pq_fx.kernels.rounding import as_bytes, inverse_one_plus_exp2, round_row, widen
from pq_fx.kernels.row_arguments import (
    as_carried,
    check_quantize,
    empty_outputs,
    row_constants,
    row_tile,
)
from pq_fx.kernels.rows import (
    Tile,
    as_rows,
    ceil_div,
    native_fp8,
    on_device_of,
    require,
    storage_bytes,
)

# exp(-2u) = exp2(x * (LINE + CUBE * x^2)) of gelu's u = sqrt(2 / pi) * (x + 0.044715 * x^3).
_GELU_LINE = tl.constexpr(-2.0 * math.sqrt(2.0 / math.pi) / math.log(2.0))
_GELU_CUBE = tl.constexpr(-2.0 * math.sqrt(2.0 / math.pi) * 0.044715 / math.log(2.0))
_SILU = tl.constexpr(-1.0 / math.log(2.0))


@triton.jit
def activation(x, ACT: tl.constexpr):
    """The activation function of fp32 x."""
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)): right at both ends, where exp is 0 or inf.
        return x * inverse_one_plus_exp2(x * (x * x * _GELU_CUBE + _GELU_LINE))
    elif ACT == "silu":
        return x * inverse_one_plus_exp2(x * _SILU)
    elif ACT == "relu":
        return tl.where(x > 0, x, tl.where(x == x, 0.0, x))
    else:
        tl.static_assert(ACT == "none")
        return x


@triton.jit
def _activated_piece(
    x_ptrs,
    gate_ptrs,
    before_ptrs,
    FIRST: tl.constexpr,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BEFORE: tl.constexpr,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """Channels FIRST to FIRST + LENGTH of ``cat([before, act(x) * gate])`` of rows; [R, LENGTH]."""
    at = FIRST + tl.arange(0, LENGTH)[None, :]
    inside = at < CHANNELS
    kind: tl.constexpr = x_ptrs.dtype.element_ty
    if FIRST + LENGTH <= BEFORE:
        return tl.load(before_ptrs[:, None] + at)
    else:
        # The channels that `x` holds; the others come first, and are not activated.
        own = inside & (at >= BEFORE)
        x = tl.load(x_ptrs[:, None] + (at - BEFORE), mask=own, other=0.0)
        y = activation(widen(x), ACT)
        if HAS_GATE:
            gate = tl.load(gate_ptrs[:, None] + (at - BEFORE), mask=own, other=0.0)
            y = y * widen(gate)
        y = round_row(y, kind)
        if FIRST < BEFORE:
            first = inside & (at < BEFORE)
            before = tl.load(before_ptrs[:, None] + at, mask=first, other=0.0)
            y = tl.where(first, before, y)
        return y


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
    TOKENS,
    x_outer_stride,
    x_stride,
    gate_outer_stride,
    gate_stride,
    before_outer_stride,
    before_stride,
    CHANNELS: tl.constexpr,
    BEFORE: tl.constexpr,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PERM: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    BY_DOT: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    TOP: tl.constexpr,
    GAIN: tl.constexpr,
    CARRIER: tl.constexpr,
    UNIT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """x, gate [B, TOKENS, K - BEFORE], before [B, TOKENS, BEFORE], strided rows, K = CHANNELS.

    data uint8 [M, K]; scale [M, K / GROUP] or fp32 [M, 1]; M = B * TOKENS.
    """
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = token < TOKENS
    # Rows that do not exist read the last one and are not stored: no mask on the wide loads.
    token = tl.minimum(token, TOKENS - 1).to(tl.int64)
    x_ptrs = x_ptr + batch * x_outer_stride + token * x_stride
    gate_ptrs = x_ptrs
    if HAS_GATE:
        gate_ptrs = gate_ptr + batch * gate_outer_stride + token * gate_stride
    before_ptrs = x_ptrs
    if BEFORE > 0:
        before_ptrs = before_ptr + batch * before_outer_stride + token * before_stride
    head = _activated_piece(
        x_ptrs,
        gate_ptrs,
        before_ptrs,
        0,
        HEAD,
        CHANNELS,
        BEFORE,
        ACT,
        HAS_GATE,
    )
    tail = head
    if TAIL > 0:
        tail = _activated_piece(
            x_ptrs,
            gate_ptrs,
            before_ptrs,
            HEAD,
            TAIL,
            CHANNELS,
            BEFORE,
            ACT,
            HAS_GATE,
        )
    if HAS_PERM:
        head, tail = gather_rows(head, tail, perm_ptr, CHANNELS, HEAD, TAIL, BY_DOT)
    quantize_rows_store(
        head,
        tail,
        as_bytes(data_ptr),
        scale_ptr,
        global_ptr,
        clip_ptr,
        batch * TOKENS + token,
        live,
        HAS_GLOBAL,
        HAS_CLIP,
        CHANNELS,
        ROWS,
        HEAD,
        TAIL,
        GROUP,
        ROTATION,
        BY_DOT,
        ELEMENT,
        SCALE,
        TOP,
        GAIN,
        CARRIER,
        UNIT,
        NATIVE_FP8,
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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch ``cat([before, act(x) * gate])``, gather, rotate, quantize; rows may be strided.

    Defined by `reference_ops.act_quantize`. tile: how programs hold rows, for measurements.

    Raises:
        KernelError: shapes, dtypes or devices do not fit.
        FormatError: K does not fit the format or the rotation.
    """
    check_choice("act", act, ACTIVATIONS)
    fmt = Format.parse(format)
    check_carrier(carrier, fmt)
    first = 0 if before is None else before.shape[-1]
    channels = first + x.shape[-1]
    check_quantize(x, channels, perm, global_scale, clip, fmt, rotation)
    if before is not None:
        require(
            (before.shape[:-1], before.device, before.dtype) == (x.shape[:-1], x.device, x.dtype),
            f"before {before.dtype} {tuple(before.shape)} on {before.device} must match x "
            f"{x.dtype} {tuple(x.shape)} on {x.device} but for its last axis",
        )
    if gate is not None:
        require(
            gate.shape == x.shape and gate.device == x.device,
            f"gate {tuple(gate.shape)} on {gate.device} must match "
            f"x {tuple(x.shape)} on {x.device}",
        )
    stored, scale = empty_outputs(x, channels, fmt, carrier)
    if stored.numel() == 0:
        return as_carried(stored, carrier), scale
    rows = as_rows(x, "x")
    gates = rows if gate is None else as_rows(gate, "gate")
    firsts = rows if before is None else as_rows(before, "before")
    tile = tile or row_tile(channels, fmt, rotation, x.dtype, perm is not None, act != "none")
    with on_device_of(x):
        launch(_act_quantize_kernel)[(ceil_div(rows.tokens, tile.rows), rows.batch)](
            rows.tensor,
            None if gate is None else gates.tensor,
            None if before is None else firsts.tensor,
            perm,
            global_scale,
            clip,
            storage_bytes(stored),
            storage_bytes(scale),
            rows.tokens,
            rows.outer_stride,
            rows.stride,
            gates.outer_stride,
            gates.stride,
            firsts.outer_stride,
            firsts.stride,
            CHANNELS=channels,
            BEFORE=first,
            ACT=act,
            HAS_GATE=gate is not None,
            HAS_PERM=perm is not None,
            HAS_GLOBAL=global_scale is not None,
            HAS_CLIP=clip is not None,
            NATIVE_FP8=native_fp8(x.device),
            num_warps=tile.warps,
            **row_constants(fmt, tile, rotation, carrier, x.dtype),
        )
    return as_carried(stored, carrier), scale


def quantize(
    x: Tensor,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
) -> tuple[Tensor, Tensor]:
    """Launch gather, rotate, quantize; arguments and errors as `reference_ops.quantize`."""
    return act_quantize(x, None, "none", None, perm, global_scale, clip, format, rotation, carrier)
