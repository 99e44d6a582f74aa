"""Weights-only linear for few rows (AdaLN modulation, text): bound by reading the packed weights.

One to `MAX_VECTOR_ROWS` rows: a GEMV. Each program owns BLOCK_N output rows and walks along K; a
thread reads 16 packed bytes at once, multiplies in fp32, sums within a group, applies the group's
scale once. Up to `MAX_SKINNY_ROWS` rows: tensor cores with the weights decoded inside
(`gemm_codes`). Above: the weight is decoded to x's dtype once and cuBLAS multiplies. Packed
layouts: `pq_fx.kernels.pack`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.codes import code_value, load_code, scale_value
from pq_fx.kernels.decode import check_packed, decode_float
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_codes import dequantizing_gemm
from pq_fx.kernels.launch import launch
from pq_fx.kernels.rounding import as_bytes
from pq_fx.kernels.rows import on_device_of, require, storage_bytes

MAX_VECTOR_ROWS = 4
MAX_SKINNY_ROWS = 64


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    global_ptr,
    bias_ptr,
    out_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [M, K], one row a program of axis 1; weight uint8 [N, K * bits / 8], scale [N, K / GROUP].

    GROUP divides BLOCK_K, except GROUP 0 (one scale a row). out [M, N].
    """
    if SCALE == "e4m3":
        scale_ptr = as_bytes(scale_ptr)
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    # Columns beyond N read the last one: no mask on the wide loads.
    safe = tl.minimum(columns, N - 1).to(tl.int64)
    x_ptr += row.to(tl.int64) * x_stride
    weight_rows = weight_ptr + safe[:, None] * weight_stride
    scale_rows = scale_ptr + safe[:, None] * scale_stride
    PART: tl.constexpr = GROUP if GROUP > 0 else BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // PART
    total = tl.zeros((BLOCK_N, GROUPS), dtype=tl.float32)
    # Counted in blocks: products with constants keep the alignment visible to the compiler.
    for block in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        if ELEMENT == "int4" or ELEMENT == "e2m1":
            pair = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            packed = tl.load(weight_rows + pair[None, :], mask=(pair < K // 2)[None, :], other=0)
            channel = block * BLOCK_K + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + channel, mask=channel < K, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(x, [BLOCK_K // 2, 2]))
            products = code_value(packed & 15, ELEMENT) * even[None, :]
            products += code_value(packed >> 4, ELEMENT) * odd[None, :]
            grouped = tl.reshape(products, [BLOCK_N, GROUPS, PART // 2])
        else:
            channel = block * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = channel < K
            x = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
            code = load_code(weight_rows, channel[None, :], inside[None, :], K, ELEMENT)
            products = code_value(code, ELEMENT) * x[None, :]
            grouped = tl.reshape(products, [BLOCK_N, GROUPS, PART])
        group = block * GROUPS + tl.arange(0, GROUPS)
        if GROUP > 0:
            stored = tl.load(
                scale_rows + group[None, :], mask=(group * GROUP < K)[None, :], other=0
            )
            total += tl.sum(grouped, axis=2) * scale_value(stored, SCALE)
        else:
            total += tl.sum(grouped, axis=2)
    result = tl.sum(total, axis=1)
    if GROUP == 0:
        result *= scale_value(tl.load(scale_ptr + safe * scale_stride), SCALE)
    if HAS_GLOBAL:
        result *= tl.load(global_ptr).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    out = out_ptr + row.to(tl.int64) * N + columns
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=column_mask)


def gemv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global: Tensor | None,
    fmt: Format,
    bias: Tensor | None,
    *,
    block_n: int = 16,
    block_k: int = 512,
    stages: int = 3,
    warps: int = 4,
) -> Tensor:
    """``x @ dequantize(weight)^T + bias`` for x [M, K], M small; fp32 sums, x.dtype out."""
    count, channels = x.shape
    check_packed(weight, weight_scale, weight_global, fmt, channels)
    columns = weight.shape[0]
    out = torch.empty((count, columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_k = min(block_k, max(triton.next_power_of_2(channels), fmt.group_size, 32))
    with on_device_of(x):
        launch(_gemv_kernel)[(triton.cdiv(columns, block_n), count)](
            x,
            weight,
            storage_bytes(weight_scale),
            weight_global,
            bias,
            out,
            columns,
            x.stride(0),
            weight.stride(0),
            weight_scale.stride(0),
            K=channels,
            HAS_GLOBAL=weight_global is not None,
            HAS_BIAS=bias is not None,
            ELEMENT=fmt.element,
            SCALE=fmt.scale,
            GROUP=fmt.group_size,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            STAGES=stages,
            num_warps=warps,
        )
    return out


def linear_weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    weight_format: str,
    bias: Tensor | None,
) -> Tensor:
    """``x @ dequantize(weight)^T + bias``; arguments as `reference_ops.linear_weight_only`.

    With more than `MAX_SKINNY_ROWS` rows the decoded weight is rounded to x's dtype.

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
    if count <= MAX_VECTOR_ROWS:
        out = gemv(rows, weight, weight_scale, weight_global_scale, fmt, bias)
    elif count <= MAX_SKINNY_ROWS:
        out = dequantizing_gemm(
            rows, None, None, None, weight, weight_scale, weight_global_scale, fmt, bias, x.dtype
        )
    else:
        value = decode_float(weight, weight_scale, weight_global_scale, fmt, channels, x.dtype)
        out = F.linear(rows, value, None if bias is None else bias.to(x.dtype))
    return out.view(*x.shape[:-1], columns)
