"""Triton: packed weights to an fp8 operand with row scales, or to 16/32-bit values, once a call.

The fp8 form is `reference.e4m3_operand`: ``data = e4m3(element * (s / r))`` with s the group's
scale (times the global one) and r = max(|s| of the row) / operand_gain. It costs one pass over the
packed bytes and is exact where every s / r is a power of two (mxfp4, "pow2"); the GEMM behind it
then runs at the full fp8 rate with scales outside its main loop. Packed layouts:
`pq_fx.kernels.pack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.codes import code_value, load_code, packed_bits, scale_value
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import launch
from pq_fx.kernels.reference import ROW_SCALE_FLOOR
from pq_fx.kernels.reference_ops import check_weight
from pq_fx.kernels.rounding import as_bytes, bits_of, e4m3_byte, float_of
from pq_fx.kernels.rows import (
    check_global_scale,
    check_scale,
    native_fp8,
    on_device_of,
    padded_length,
    require,
    storage_bytes,
)

_ROW_SCALE_FLOOR = tl.constexpr(ROW_SCALE_FLOOR)
# Weights that one launch decodes.
AT_ONCE = 4


@triton.jit
def _store_elements(
    out_ptr, offsets, mask, elements, TO_FP8: tl.constexpr, NATIVE_FP8: tl.constexpr
):
    if TO_FP8:
        tl.store(out_ptr + offsets, e4m3_byte(elements, NATIVE_FP8), mask=mask)
    else:
        tl.store(out_ptr + offsets, elements.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_kernel(
    weight_ptr,
    scale_ptr,
    global_ptr,
    bias_ptr,
    weight_1_ptr,
    scale_1_ptr,
    global_1_ptr,
    bias_1_ptr,
    weight_2_ptr,
    scale_2_ptr,
    global_2_ptr,
    bias_2_ptr,
    weight_3_ptr,
    scale_3_ptr,
    global_3_ptr,
    bias_3_ptr,
    out_ptr,
    row_ptr,
    joint_ptr,
    end,
    end_1,
    end_2,
    weight_stride,
    scale_stride,
    first_row,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GAIN: tl.constexpr,
    TO_FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """COUNT weights uint8 [N_i, K * bits / 8] with scales [N_i, K / GROUP], one row a program.

    out [N, K], N = sum N_i; row fp32 [N] (TO_FP8); joint [N] gets the biases [N_i] (HAS_BIAS). end_i
    is where weight i's rows end. out, row and joint may be longer: results begin at `first_row`.
    """
    program = tl.program_id(0)
    row = program
    if COUNT > 1 and program >= end:
        row = program - end
        weight_ptr, scale_ptr = weight_1_ptr, scale_1_ptr
        if HAS_GLOBAL:
            global_ptr = global_1_ptr
        if HAS_BIAS:
            bias_ptr = bias_1_ptr
    if COUNT > 2 and program >= end_1:
        row = program - end_1
        weight_ptr, scale_ptr = weight_2_ptr, scale_2_ptr
        if HAS_GLOBAL:
            global_ptr = global_2_ptr
        if HAS_BIAS:
            bias_ptr = bias_2_ptr
    if COUNT > 3 and program >= end_2:
        row = program - end_2
        weight_ptr, scale_ptr = weight_3_ptr, scale_3_ptr
        if HAS_GLOBAL:
            global_ptr = global_3_ptr
        if HAS_BIAS:
            bias_ptr = bias_3_ptr
    row = row.to(tl.int64)
    target = first_row + program.to(tl.int64)
    weight_ptr += row * weight_stride
    if TO_FP8:
        out_ptr = as_bytes(out_ptr)
    if SCALE == "e4m3":
        scale_ptr = as_bytes(scale_ptr)
    out_ptr += target * CHANNELS
    if HAS_BIAS:
        tl.store(joint_ptr + target, tl.load(bias_ptr + row).to(joint_ptr.dtype.element_ty))
    index = tl.arange(0, LENGTH // GROUP)
    present = index * GROUP < CHANNELS
    factor = scale_value(
        tl.load(scale_ptr + row * scale_stride + index, mask=present, other=0), SCALE
    )
    if HAS_GLOBAL:
        factor = tl.load(global_ptr).to(tl.float32) * factor
    if TO_FP8:
        # Without their sign scales order by their bits as integers, NaN last. Padding counts as 0.
        bits = tl.where(present, bits_of(factor) & 0x7FFFFFFF, 0)
        largest = float_of(tl.max(bits, axis=0)) * (1.0 / GAIN)
        largest = tl.where(largest == largest, tl.maximum(largest, _ROW_SCALE_FLOOR), largest)
        factor = tl.div_rn(factor, tl.zeros_like(factor) + largest)
        tl.store(row_ptr + target, largest)
    # Not a reshape of one range, and a constant row length: the compiler must see that neighbors
    # are contiguous and their masks equal, or it loads single bytes.
    offsets = index[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if packed_bits(ELEMENT) == 4:
        pairs = index[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        packed = tl.load(weight_ptr + pairs, mask=pairs < CHANNELS // 2, other=0)
        low = code_value(packed & 15, ELEMENT) * factor[:, None]
        high = code_value(packed >> 4, ELEMENT) * factor[:, None]
        elements = tl.reshape(tl.join(low, high), [LENGTH // GROUP, GROUP])
        _store_elements(out_ptr, offsets, offsets < CHANNELS, elements, TO_FP8, NATIVE_FP8)
    else:
        mask = offsets < CHANNELS
        codes = load_code(weight_ptr, offsets, mask, CHANNELS, ELEMENT)
        elements = code_value(codes, ELEMENT) * factor[:, None]
        _store_elements(out_ptr, offsets, mask, elements, TO_FP8, NATIVE_FP8)


def check_packed(
    weight: Tensor, scale: Tensor, global_scale: Tensor | None, fmt: Format, channels: int
) -> None:
    """Raise KernelError or FormatError unless a packed weight and its scales fit together."""
    fmt.check_channels(channels)
    check_weight(weight, fmt, channels)
    check_scale("weight_scale", scale, weight.shape[0], channels, fmt)
    require(
        scale.device == weight.device,
        f"weight_scale is on {scale.device}, weight on {weight.device}",
    )
    check_global_scale(global_scale, fmt)
    require(
        weight.stride(-1) == 1 and scale.stride(-1) == 1,
        "packed weights and their scales must have contiguous rows",
    )


class Packed(NamedTuple):
    """A packed weight: bytes uint8 [N, K * bits / 8], scales [N, K / g], global scale, bias [N]."""

    weight: Tensor
    scale: Tensor
    global_scale: Tensor | None
    bias: Tensor | None = None


def _launch(
    parts: Sequence[Packed],
    fmt: Format,
    channels: int,
    out: Tensor,
    row: Tensor | None,
    joint: Tensor | None,
    first_row: int,
) -> None:
    """Decode up to `AT_ONCE` weights into out (fp8 where `row` is given) from `first_row` on."""
    ends: list[int] = []
    arguments: list[Any] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + part.weight.shape[0])
        arguments += [part.weight.contiguous(), storage_bytes(part.scale.contiguous())]
        arguments += [part.global_scale, part.bias if joint is not None else None]
    if ends[-1] == 0:
        return
    missing = AT_ONCE - len(parts)
    length = padded_length(channels)
    with on_device_of(out):
        launch(_decode_kernel)[(ends[-1],)](
            *arguments,
            *[None] * (4 * missing),
            storage_bytes(out),
            row,
            joint,
            *(ends + [0] * missing)[: AT_ONCE - 1],
            arguments[0].stride(0),
            arguments[1].stride(0),
            first_row,
            COUNT=len(parts),
            CHANNELS=channels,
            HAS_GLOBAL=parts[0].global_scale is not None,
            HAS_BIAS=joint is not None,
            LENGTH=length,
            GROUP=fmt.group_size or length,
            ELEMENT=fmt.element,
            SCALE=fmt.stored_scale,
            GAIN=float(fmt.operand_gain),
            TO_FP8=row is not None,
            NATIVE_FP8=native_fp8(out.device),
            num_warps=min(max(length // 4096, 1), 8),
            enable_fp_fusion=False,
        )


def decode_e4m3(
    parts: Sequence[Packed], fmt: Format, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed weights to one operand: float8_e4m3fn [N, K], fp32 rows [N, 1], bias [N] in `dtype`.

    Linears that share their input are decoded side by side by one launch, their biases joined, and run
    as one GEMM; N = sum N_i. The result lives in the caching allocator's memory for one GEMM: the same
    block serves every layer of a stream, also inside a CUDA graph, so the scratch costs one layer's
    fp8 weights in all.

    Raises:
        KernelError, FormatError: weights, scales, biases and format do not fit together.
    """
    for key in ("bias", "global_scale"):
        present = sum(getattr(part, key) is not None for part in parts)
        require(
            present in (0, len(parts)),
            f"joined linears have a {key.replace('_', ' ')} each, or none of them has",
        )
    for part in parts:
        check_packed(part.weight, part.scale, part.global_scale, fmt, channels)
    count, device = sum(part.weight.shape[0] for part in parts), parts[0].weight.device
    out = torch.empty((count, channels), dtype=torch.float8_e4m3fn, device=device)
    row = torch.empty((count, 1), dtype=torch.float32, device=device)
    bias, joint = parts[0].bias, None
    if bias is not None:
        if len(parts) > 1:
            joint = torch.empty(count, dtype=dtype, device=device)
        bias = bias.to(dtype) if joint is None else joint
    first = 0
    for i in range(0, len(parts), AT_ONCE):
        some = parts[i : i + AT_ONCE]
        _launch(some, fmt, channels, out, row, joint, first)
        first += sum(part.weight.shape[0] for part in some)
    return out, row, bias


def decode_float(
    weight: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    fmt: Format,
    channels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Packed weight to its dequantized values [N, K], fp32 products rounded to `dtype`."""
    check_packed(weight, scale, global_scale, fmt, channels)
    out = torch.empty((weight.shape[0], channels), dtype=dtype, device=weight.device)
    _launch([Packed(weight, scale, global_scale)], fmt, channels, out, None, None, 0)
    return out
