"""Weights-only linear for few rows (AdaLN modulation, text): bound by reading the packed weights.

Up to `MAX_ROWS` rows: each program owns BLOCK_N output columns and walks along K. A thread reads 16
packed bytes at once, turns them into 16-bit floats by bit moves (`unpack_bits`), and tensor cores
multiply them with the rows, padded to 8: one dot a group, so that the group's scale multiplies its
fp32 partial sum and products stay exact. fp32 rows are split into three bf16 rows each. Above: the
weight is decoded to x's dtype once and cuBLAS multiplies. Packed layouts: `pq_fx.kernels.pack`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.codes import scale_value
from pq_fx.kernels.decode import check_packed, decode_float
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import launch
from pq_fx.kernels.rounding import as_bytes
from pq_fx.kernels.rows import (
    INTERPRETED,
    ceil_div,
    on_device_of,
    power_of_2,
    require,
    storage_bytes,
)
from pq_fx.kernels.unpack_bits import load_values, multiply_pairs

MAX_ROWS = 64


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    global_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    x_stride,
    weight_stride,
    scale_stride,
    K: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [M, K], M <= BLOCK_M; weight uint8 [N, K * bits / 8], scale [N, K / GROUP]; out [M, N].

    GROUP divides BLOCK_K, except GROUP 0 (one scale a row). DOT: dtype of the dot's operands.
    """
    if SCALE == "e4m3":
        scale_ptr = as_bytes(scale_ptr)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns beyond N read the last one: no mask on the wide loads.
    safe = tl.minimum(columns, N - 1).to(tl.int64)
    weight_rows = weight_ptr + safe[:, None] * weight_stride
    # Groups of 16 go in pairs through a dot of 32 channels (one of 16 came out wrong on sm_90 with
    # Triton 3.6): once with the second half of the rows' channels zero, once with the first.
    # nvfp4's scale goes into the element first: 2 and 4 significant bits make 6, which 16 bits hold.
    FOLD: tl.constexpr = SCALE == "e4m3"
    APART: tl.constexpr = GROUP > 0 and not FOLD
    HALVES: tl.constexpr = 2 if GROUP == 16 and APART else 1
    PART: tl.constexpr = GROUP * HALVES if APART else (64 if BLOCK_K > 64 else BLOCK_K)
    GROUPS: tl.constexpr = BLOCK_K // PART
    column = tl.arange(0, BLOCK_M * HALVES)[None, None, :]
    row = column % BLOCK_M
    part = tl.arange(0, GROUPS)
    inner = part[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
    x_rows = x_ptr + row.to(tl.int64) * x_stride
    x_mask = row < M
    if HALVES > 1:
        x_mask = x_mask & (tl.arange(0, PART)[None, :, None] // GROUP == column // BLOCK_M)
    total = tl.zeros((GROUPS, BLOCK_N, BLOCK_M * HALVES), dtype=tl.float32)
    # Counted in blocks: products with constants keep the alignment visible to the compiler.
    for block in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        first = block * BLOCK_K
        w = load_values(weight_rows, first, K, BLOCK_N, BLOCK_K, ELEMENT, DOT)
        if FOLD:
            group = block * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)[None, :]
            stored = tl.load(
                scale_ptr + safe[:, None] * scale_stride + group, mask=group * GROUP < K, other=0
            )
            scale = scale_value(stored, SCALE).to(DOT)[:, :, None]
            w = tl.reshape(w, [BLOCK_N, BLOCK_K // GROUP, GROUP])
            w = multiply_pairs(w, tl.broadcast_to(scale, [BLOCK_N, BLOCK_K // GROUP, GROUP]))
        w = tl.permute(tl.reshape(w, [BLOCK_N, GROUPS, PART]), [1, 0, 2])
        x = tl.load(x_rows + (first + inner), mask=x_mask & (first + inner < K), other=0.0)
        partial = tl.dot(w, x.to(DOT), input_precision="ieee")
        if APART:
            half = tl.arange(0, HALVES)[None, None, :]
            group = (block * GROUPS + part[:, None, None]) * HALVES + half
            stored = tl.load(
                scale_ptr + safe[None, :, None] * scale_stride + group,
                mask=group * GROUP < K,
                other=0,
            )
            scale = scale_value(stored, SCALE)[:, :, :, None]
            scale = tl.broadcast_to(scale, [GROUPS, BLOCK_N, HALVES, BLOCK_M])
            partial = partial * tl.reshape(scale, [GROUPS, BLOCK_N, HALVES * BLOCK_M])
        total += partial
    result = tl.sum(total, axis=0)
    if HALVES > 1:
        result = tl.sum(tl.reshape(result, [BLOCK_N, HALVES, BLOCK_M]), axis=1)
    if GROUP == 0:
        result *= scale_value(tl.load(scale_ptr + safe * scale_stride), SCALE)[:, None]
    if HAS_GLOBAL:
        result *= tl.load(global_ptr).to(tl.float32)
    column_mask = columns < N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        result += bias[:, None]
    rows = tl.arange(0, BLOCK_M)
    out = out_ptr + rows.to(tl.int64)[None, :] * N + columns[:, None]
    mask = column_mask[:, None] & (rows < M)[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=mask)


def gemv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global: Tensor | None,
    fmt: Format,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    block_n: int = 32,
    block_k: int = 0,
    stages: int = 3,
    warps: int = 4,
) -> Tensor:
    """``x @ dequantize(weight)^T + bias`` for 16-bit x [M, K], M small; fp32 sums, `dtype` out."""
    count, channels = x.shape
    check_packed(weight, weight_scale, weight_global, fmt, channels)
    columns = weight.shape[0]
    out = torch.empty((count, columns), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    # At most 16 groups a block, whose partial sums are kept apart: few registers.
    apart = 32 if fmt.two_level else fmt.group_size or 32
    block_k = block_k or min(512 if count <= 16 else 256, 16 * apart)
    block_k = min(block_k, max(power_of_2(channels), fmt.group_size, 32))
    dot = tl.float16 if x.dtype == torch.float16 else tl.bfloat16
    with on_device_of(x):
        launch(_gemv_kernel)[(ceil_div(columns, block_n),)](
            x,
            weight,
            storage_bytes(weight_scale),
            weight_global,
            bias,
            out,
            count,
            columns,
            x.stride(0),
            weight.stride(0),
            weight_scale.stride(0),
            K=channels,
            HAS_GLOBAL=weight_global is not None,
            HAS_BIAS=bias is not None,
            ELEMENT=fmt.element,
            SCALE=fmt.stored_scale,
            GROUP=fmt.group_size,
            DOT=tl.float32 if INTERPRETED else dot,
            BLOCK_M=max(8, power_of_2(count)),
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            STAGES=stages,
            num_warps=warps,
        )
    return out


def split_bf16(x: Tensor) -> Tensor:
    """fp32 [M, K] as bf16 [3, M, K] that sum to x up to 2^-24 of it."""
    parts = []
    for _ in range(3):
        part = x.to(torch.bfloat16)
        parts.append(part)
        x = x - part.float()
    return torch.stack(parts)


def linear_weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    weight_format: str,
    bias: Tensor | None,
) -> Tensor:
    """``x @ dequantize(weight)^T + bias``; arguments as `reference_ops.linear_weight_only`.

    With more than `MAX_ROWS` rows the decoded weight is rounded to x's dtype.

    Raises:
        KernelError, FormatError: shapes, dtypes or formats do not fit.
    """
    fmt = Format.parse(weight_format)
    channels, columns = x.shape[-1], weight.shape[0]
    require(
        x.dtype in (torch.float16, torch.bfloat16, torch.float32),
        f"x must be float16, bfloat16 or float32, got {x.dtype}",
    )
    require(
        bias is None or (tuple(bias.shape) == (columns,) and bias.device == x.device),
        f"bias must have shape ({columns},) on {x.device}",
    )
    rows = x.reshape(-1, channels)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    count = rows.shape[0]
    packed = (weight, weight_scale, weight_global_scale, fmt)
    if count > MAX_ROWS:
        value = decode_float(*packed, channels, x.dtype)
        out = F.linear(rows, value, None if bias is None else bias.to(x.dtype))
    elif x.dtype == torch.float32:
        # All parts at once read the weight once, where they are few enough for shared memory.
        split = split_bf16(rows).view(-1, channels).split(MAX_ROWS)
        parts = [gemv(part, *packed, None, torch.float32) for part in split]
        out = torch.cat(parts).view(3, count, columns).sum(dim=0)
        out = out if bias is None else out + bias.float()
    else:
        out = gemv(rows, *packed, bias, x.dtype)
    return out.view(*x.shape[:-1], columns)
