"""Linear of quantized activations and packed weights, at the fp8 rate on Hopper and Ada.

Carrier "e4m3": the packed weight is decoded to an e4m3 operand with row scales (`decode`), then one
fp8 GEMM with one scale a row on either side: cuBLAS through `torch._scaled_mm` where it takes the
shape and dtype, else a Triton kernel. No group scale is left for the GEMM's main loop, which is
what makes it run at the full rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.errors import UnsupportedDeviceError
from pq_fx.kernels.decode import Packed, decode_e4m3
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_output import store_output
from pq_fx.kernels.launch import launch
from pq_fx.kernels.rounding import e4m3_value
from pq_fx.kernels.rows import (
    INTERPRETED,
    ceil_div,
    native_fp8,
    on_device_of,
    require,
    storage_bytes,
)


@triton.jit
def _fp8_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """a [M, K], b [N, K] e4m3 (bytes without NATIVE_FP8); a_scale [M], b_scale [N]; out [M, N]."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # Programs that run together share rows of a and b in L2.
    first_m = (pid // (GROUP_M * blocks_n)) * GROUP_M
    size_m = tl.minimum(blocks_m - first_m, GROUP_M)
    inside = pid % (GROUP_M * blocks_n)
    rows = (first_m + inside % size_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (inside // size_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < N
    channel = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + rows.to(tl.int64)[:, None] * K + channel[None, :]
    b_tile = b_ptr + columns.to(tl.int64)[None, :] * K + channel[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        valid = channel < K - start
        a = tl.load(a_tile, mask=row_mask[:, None] & valid[None, :], other=0.0)
        b = tl.load(b_tile, mask=column_mask[None, :] & valid[:, None], other=0.0)
        if NATIVE_FP8:
            accumulator = tl.dot(a, b, accumulator)
        else:
            accumulator = tl.dot(e4m3_value(a), e4m3_value(b), accumulator, input_precision="ieee")
        a_tile += BLOCK_K
        b_tile += BLOCK_K
    accumulator *= tl.load(a_scale_ptr + rows, mask=row_mask, other=0.0)[:, None]
    accumulator *= tl.load(b_scale_ptr + columns, mask=column_mask, other=0.0)[None, :]
    store_output(
        accumulator,
        rows,
        columns,
        M,
        N,
        bias_ptr,
        bias_ptr,
        bias_ptr,
        out_ptr,
        False,
        False,
        HAS_BIAS,
    )


def fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(a @ b^T) * a_scale * b_scale^T + bias`` in Triton: any shape and output dtype.

    a [M, K], b [N, K] contiguous float8_e4m3fn; a_scale [M, 1], b_scale [N, 1] fp32; out [M, N].
    """
    count, channels = a.shape
    columns = b.shape[0]
    out = torch.empty((count, columns), dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    native = native_fp8(a.device)
    block_m, block_n = (64, 64) if count <= 64 or INTERPRETED else (128, 128)
    with on_device_of(a):
        launch(_fp8_gemm_kernel)[(ceil_div(count, block_m) * ceil_div(columns, block_n),)](
            storage_bytes(a),
            a_scale,
            storage_bytes(b),
            b_scale,
            bias,
            out,
            count,
            columns,
            K=channels,
            HAS_BIAS=bias is not None,
            NATIVE_FP8=native,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=64 if INTERPRETED else 128,
            GROUP_M=8,
            num_warps=4 if block_m == 64 else 8,
            num_stages=3,
        )
    return out


def cublas_takes(count: int, columns: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` with row scales runs this: sizes of 16, bf16 out, some rows."""
    return count > 0 and columns % 16 == 0 and channels % 16 == 0 and dtype == torch.bfloat16


def scaled_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`fp8_gemm` by cuBLAS where it takes the shape and dtype, else by Triton."""
    if INTERPRETED or not cublas_takes(a.shape[0], b.shape[0], a.shape[1], dtype):
        return fp8_gemm(a, a_scale, b, b_scale, bias, dtype)
    return torch._scaled_mm(
        a, b.t(), a_scale, b_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def fp8_linears(
    data: Tensor,
    scale: Tensor,
    parts: Sequence[Packed],
    weight_format: Format,
    dtype: torch.dtype,
) -> Tensor:
    """``x @ W_i^T + bias_i`` joined, [M, sum N_i]: weights decoded into one operand for one GEMM.

    data float8_e4m3fn [M, K], scale fp32 with one entry a row.

    Raises:
        KernelError, FormatError: shapes, dtypes or formats do not fit.
        UnsupportedDeviceError: a GPU without fp8 tensor cores.
    """
    if not INTERPRETED and not native_fp8(data.device):
        raise UnsupportedDeviceError(
            f"{torch.cuda.get_device_name(data.device)} has no fp8 tensor cores; quantize with the "
            "carrier that pq_fx.kernels.devices.carrier gives for it"
        )
    require(
        scale.dtype == torch.float32 and scale.numel() == data.shape[0],
        f"e4m3 data wants one fp32 scale a row, got {scale.dtype} {tuple(scale.shape)}",
    )
    operand, rows, bias = decode_e4m3(parts, weight_format, data.shape[1], dtype)
    return scaled_gemm(data.contiguous(), scale.reshape(-1, 1), operand, rows, bias, dtype)
