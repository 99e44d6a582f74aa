"""Triton GEMM on int8 tensor cores: lattice points by packed weights, exact, for sm_80 and sm_86.

Integer elements, and e2m1's doubled, are int8 lattice points: products and the int32
sums of a group are exact, then group scales multiply them in fp32. Ampere's int8 tensor cores run at
twice the 16-bit rate. An int8 dot takes 32 channels, so groups of 16 go to `gemm_codes`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.carriers import int8_unit
from pq_fx.kernels.codes import code_lattice, load_code, packed_bits, scale_value
from pq_fx.kernels.decode import check_packed
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_output import row_blocks, store_output
from pq_fx.kernels.launch import launch
from pq_fx.kernels.rows import INTERPRETED, ceil_div, check_scale, on_device_of, storage_bytes

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _int8_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    a_stride,
    a_scale_stride,
    b_stride,
    b_scale_stride,
    K: tl.constexpr,
    A_SCALE: tl.constexpr,
    A_GROUP: tl.constexpr,
    B_ELEMENT: tl.constexpr,
    B_SCALE: tl.constexpr,
    B_GROUP: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """a int8 [M, K], b packed uint8 [N, K * bits / 8], both with stored scales; out [M, N].

    Groups of 0 are one a row. BLOCK_K divides both groups. STEP: value of a product of lattice 1.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the last one and are not stored: no mask on wide loads.
    safe_rows = tl.minimum(rows, M - 1).to(tl.int64)
    safe_columns = tl.minimum(columns, N - 1).to(tl.int64)
    a_rows = a_ptr + safe_rows[:, None] * a_stride
    b_rows = b_ptr + safe_columns[:, None] * b_stride
    a_scales = a_scale_ptr + safe_rows * a_scale_stride
    b_scales = b_scale_ptr + safe_columns * b_scale_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        first = block * BLOCK_K
        channel = first + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(a_rows + channel, mask=channel < K, other=0)
        b = _load_lattice(b_rows, first, K, BLOCK_N, BLOCK_K, B_ELEMENT)
        if _INTERPRETED:  # numpy multiplies int8 in int8; sums are below 2^24, so fp32 is exact
            partial = tl.dot(a.to(tl.float32), tl.trans(b).to(tl.float32), input_precision="ieee")
        else:
            partial = tl.dot(a, tl.trans(b), out_dtype=tl.int32).to(tl.float32)
        a_group = first // A_GROUP if A_GROUP > 0 else 0
        b_group = first // B_GROUP if B_GROUP > 0 else 0
        a_scale = scale_value(tl.load(a_scales + a_group), A_SCALE) * STEP
        b_scale = scale_value(tl.load(b_scales + b_group), B_SCALE)
        sums += partial * b_scale[None, :] * a_scale[:, None]
    store_output(
        sums, rows, columns, M, N, bias_ptr, bias_ptr, bias_ptr, out_ptr, False, False, HAS_BIAS
    )


@triton.jit
def _load_lattice(
    base,
    first,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """int8 lattice points [ROWS, COUNT] of channels first to first + COUNT of packed rows `base`."""
    if packed_bits(ELEMENT) == 4:
        byte = first // 2 + tl.arange(0, COUNT // 2)[None, :]
        packed = tl.load(base + byte, mask=byte < CHANNELS // 2, other=0)
        low, high = code_lattice(packed & 15, ELEMENT), code_lattice(packed >> 4, ELEMENT)
        return tl.reshape(tl.join(low, high), [ROWS, COUNT])
    else:
        channel = first + tl.arange(0, COUNT)[None, :]
        return code_lattice(
            load_code(base, channel, channel < CHANNELS, CHANNELS, ELEMENT), ELEMENT
        )


def takes_int8(a_format: Format, weight_format: Format) -> bool:
    """Whether `int8_gemm` multiplies these formats: integers of 8 bits, groups of 32 and more."""
    formats = (a_format, weight_format)
    return all(f.element != "e4m3" and not f.two_level and f.group_size != 16 for f in formats)


def int8_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_format: Format,
    weight: Tensor,
    weight_scale: Tensor,
    weight_format: Format,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize(a) @ dequantize(weight)^T + bias`` [M, N] in `dtype`; a int8 [M, K].

    The formats are those of `takes_int8`; none of them has a global scale.

    Raises:
        KernelError, FormatError: shapes, dtypes or formats do not fit.
    """
    count, channels = a.shape
    check_packed(weight, weight_scale, None, weight_format, channels)
    check_scale("scale", a_scale, count, channels, a_format)
    a_scale = a_scale.contiguous()
    columns = weight.shape[0]
    out = torch.empty((count, columns), dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    a = a if a.stride(-1) == 1 else a.contiguous()
    groups = [f.group_size for f in (a_format, weight_format) if f.group_size]
    block_m, block_n = (32, 32) if count <= 32 or INTERPRETED else (128, 64)
    with on_device_of(a):
        launch(_int8_gemm_kernel)[(ceil_div(columns, block_n), row_blocks(count, block_m))](
            a,
            storage_bytes(a_scale),
            weight,
            storage_bytes(weight_scale),
            bias,
            out,
            count,
            columns,
            a.stride(0),
            a_scale.stride(0),
            weight.stride(0),
            weight_scale.stride(0),
            K=channels,
            A_SCALE=a_format.stored_scale,
            A_GROUP=a_format.group_size,
            B_ELEMENT=weight_format.element,
            B_SCALE=weight_format.stored_scale,
            B_GROUP=weight_format.group_size,
            STEP=1.0 / (int8_unit(a_format) * int8_unit(weight_format)),
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=min([128, *groups]),
            STAGES=3,
            num_warps=4,
        )
    return out
