"""Triton: packed weights to an fp8 operand with row scales, or to 16/32-bit values, once a call.

The fp8 form is `reference.e4m3_operand`: ``data = e4m3(element * (s / r))`` with s the group's
scale (times the global one) and r = max(s of the row) / operand_gain. It costs one pass over the
packed bytes and is exact where every s / r is a power of two (mxfp4, "pow2"); the GEMM behind it
then runs at the full fp8 rate with scales outside its main loop. Packed layouts:
`pq_fx.kernels.pack`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.codes import code_value, load_code, scale_value
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import launch
from pq_fx.kernels.reference import ROW_SCALE_FLOOR
from pq_fx.kernels.reference_ops import check_weight
from pq_fx.kernels.rounding import as_bytes, bits_of, e4m3_byte, float_of
from pq_fx.kernels.rows import (
    native_fp8,
    on_device_of,
    padded_length,
    require,
    scale_dtype,
    storage_bytes,
)

_ROW_SCALE_FLOOR = tl.constexpr(ROW_SCALE_FLOOR)


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
    out_ptr,
    row_ptr,
    weight_stride,
    scale_stride,
    first_row,
    CHANNELS: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GAIN: tl.constexpr,
    TO_FP8: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """weight uint8 [N, K * bits / 8], scale [N, K / GROUP]; out [N, K]; row fp32 [N] (TO_FP8).

    out and row may be longer: the results begin at `first_row`.
    """
    row = tl.program_id(0).to(tl.int64)
    weight_ptr += row * weight_stride
    if TO_FP8:
        out_ptr = as_bytes(out_ptr)
    if SCALE == "e4m3":
        scale_ptr = as_bytes(scale_ptr)
    out_ptr += (first_row + row) * CHANNELS
    index = tl.arange(0, LENGTH // GROUP)
    present = index * GROUP < CHANNELS
    factor = scale_value(
        tl.load(scale_ptr + row * scale_stride + index, mask=present, other=0), SCALE
    )
    if HAS_GLOBAL:
        factor = tl.load(global_ptr).to(tl.float32) * factor
    if TO_FP8:
        # Scales are positive or NaN: their bits order as integers, NaN last. Padding counts as 0.
        bits = tl.where(present, bits_of(factor) & 0x7FFFFFFF, 0)
        largest = float_of(tl.max(bits, axis=0)) * (1.0 / GAIN)
        largest = tl.where(largest == largest, tl.maximum(largest, _ROW_SCALE_FLOOR), largest)
        factor = tl.div_rn(factor, tl.zeros_like(factor) + largest)
        tl.store(row_ptr + first_row + row, largest)
    # Not a reshape of one range, and a constant row length: the compiler must see that neighbors
    # are contiguous and their masks equal, or it loads single bytes.
    offsets = index[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if ELEMENT == "int4" or ELEMENT == "e2m1":
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
    expected = (weight.shape[0], fmt.groups(channels))
    require(
        tuple(scale.shape) == expected and scale.dtype == scale_dtype(fmt),
        f"weight_scale is {scale.dtype} {tuple(scale.shape)}; {fmt.key} with K={channels} wants "
        f"{scale_dtype(fmt)} {expected}",
    )
    require(
        scale.device == weight.device,
        f"weight_scale is on {scale.device}, weight on {weight.device}",
    )
    require(
        global_scale is None or (fmt.two_level and global_scale.numel() == 1),
        f"a global scale is one number and only for nvfp4, not for {fmt.key}",
    )
    require(
        weight.stride(-1) == 1 and scale.stride(-1) == 1,
        "packed weights and their scales must have contiguous rows",
    )


def _launch(
    weight: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    fmt: Format,
    channels: int,
    out: Tensor,
    row: Tensor | None,
    to_fp8: bool,
    first_row: int = 0,
) -> None:
    check_packed(weight, scale, global_scale, fmt, channels)
    if weight.shape[0] == 0:
        return
    length = padded_length(channels)
    with on_device_of(weight):
        launch(_decode_kernel)[(weight.shape[0],)](
            weight,
            storage_bytes(scale),
            global_scale,
            storage_bytes(out),
            row,
            weight.stride(0),
            scale.stride(0),
            first_row,
            CHANNELS=channels,
            HAS_GLOBAL=global_scale is not None,
            LENGTH=length,
            GROUP=fmt.group_size or length,
            ELEMENT=fmt.element,
            SCALE=fmt.scale,
            GAIN=float(fmt.operand_gain),
            TO_FP8=to_fp8,
            NATIVE_FP8=native_fp8(weight.device),
            num_warps=min(max(length // 4096, 1), 8),
            enable_fp_fusion=False,
        )


def decode_e4m3(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    global_scales: Sequence[Tensor | None],
    fmt: Format,
    channels: int,
) -> tuple[Tensor, Tensor]:
    """Packed weights [N_i, K * bits / 8] to one operand: float8_e4m3fn [sum N_i, K], fp32 rows [.., 1].

    Linears that share their input are decoded side by side and run as one GEMM. The result lives in
    the caching allocator's memory for one GEMM: the same block serves every layer of a stream, also
    inside a CUDA graph, so the scratch costs one layer's fp8 weights in all.

    Raises:
        KernelError, FormatError: weights, scales and format do not fit together.
    """
    count, device = sum(w.shape[0] for w in weights), weights[0].device
    out = torch.empty((count, channels), dtype=torch.float8_e4m3fn, device=device)
    row = torch.empty((count, 1), dtype=torch.float32, device=device)
    first = 0
    for weight, scale, global_scale in zip(weights, scales, global_scales, strict=True):
        _launch(weight, scale, global_scale, fmt, channels, out, row, True, first)
        first += weight.shape[0]
    return out, row


def decode_float(
    weight: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    fmt: Format,
    channels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Packed weight to its dequantized values [N, K], fp32 products rounded to `dtype`."""
    out = torch.empty((weight.shape[0], channels), dtype=dtype, device=weight.device)
    _launch(weight, scale, global_scale, fmt, channels, out, None, False)
    return out
