"""Triton GEMM on block-scaled 4-bit tensor cores (nvfp4, mxfp4), for sm_100 and sm_120. Never run.

`tl.dot_scaled` takes packed e2m1 operands with their stored group scales as they are and becomes
``tcgen05.mma.kind::mxf4nvf4`` or ``kind::mxf4`` (sm_100), ``mma.sync.kind::mxf4nvf4`` (sm_120);
tests/compile_only/test_targets.py names them. nvfp4's global scales multiply the fp32 sums. No such
GPU was at hand: this is compiled to machine code, and its indexing is tested in Triton's interpreter,
which has no such dot and decodes the operands instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.codes import code_value, scale_value
from pq_fx.kernels.decode import check_packed
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_output import row_blocks, store_output
from pq_fx.kernels.launch import launch
from pq_fx.kernels.rounding import as_bytes
from pq_fx.kernels.rows import INTERPRETED, ceil_div, check_scale, on_device_of, storage_bytes

_INTERPRETED = tl.constexpr(INTERPRETED)
_CHIPS = ((10, 0), (12, 0))


@triton.jit
def _decoded(packed, scale, ROWS: tl.constexpr, COUNT: tl.constexpr, SCALE: tl.constexpr):
    """fp32 values [ROWS, COUNT] of packed e2m1 rows and their stored scales, for the interpreter."""
    low, high = code_value(packed & 15, "e2m1"), code_value(packed >> 4, "e2m1")
    size: tl.constexpr = COUNT // scale.shape[1]
    values = tl.reshape(tl.join(low, high), [ROWS, COUNT // size, size])
    return tl.reshape(values * scale_value(scale, SCALE)[:, :, None], [ROWS, COUNT])


@triton.jit
def _e2m1_gemm_kernel(
    a_ptr,
    a_scale_ptr,
    a_global_ptr,
    b_ptr,
    b_scale_ptr,
    b_global_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    a_stride,
    a_scale_stride,
    b_stride,
    b_scale_stride,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_A_GLOBAL: tl.constexpr,
    HAS_B_GLOBAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a [M, K / 2], b [N, K / 2] packed e2m1; scales [M or N, K / GROUP] stored; out [M, N]."""
    a_ptr = as_bytes(a_ptr)
    a_scale_ptr = as_bytes(a_scale_ptr)
    b_scale_ptr = as_bytes(b_scale_ptr)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the last one and are not stored: no mask on wide loads.
    safe_rows = tl.minimum(rows, M - 1).to(tl.int64)[:, None]
    safe_columns = tl.minimum(columns, N - 1).to(tl.int64)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        group = first // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
        inside, present = byte < K // 2, group < K // GROUP
        a = tl.load(a_ptr + safe_rows * a_stride + byte, mask=inside, other=0)
        b = tl.load(b_ptr + safe_columns * b_stride + byte, mask=inside, other=0)
        a_scale = tl.load(a_scale_ptr + safe_rows * a_scale_stride + group, mask=present, other=0)
        b_scale = tl.load(
            b_scale_ptr + safe_columns * b_scale_stride + group, mask=present, other=0
        )
        if _INTERPRETED:
            wide = _decoded(a, a_scale, BLOCK_M, BLOCK_K, SCALE)
            other = _decoded(b, b_scale, BLOCK_N, BLOCK_K, SCALE)
            sums = tl.dot(wide, tl.trans(other), sums, input_precision="ieee")
        else:
            if SCALE == "e4m3":
                a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
                b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
            sums = tl.dot_scaled(a, a_scale, "e2m1", tl.trans(b), b_scale, "e2m1", sums)
    store_output(
        sums,
        rows,
        columns,
        M,
        N,
        a_global_ptr,
        b_global_ptr,
        bias_ptr,
        out_ptr,
        HAS_A_GLOBAL,
        HAS_B_GLOBAL,
        HAS_BIAS,
    )


def takes_e2m1(device: torch.device, a_format: Format, weight_format: Format) -> bool:
    """Whether `device` multiplies these formats block-scaled: nvfp4 by nvfp4, or mxfp4 by mxfp4."""
    formats = [(f.name, f.stored_scale) for f in (a_format, weight_format)]
    if formats[0] != formats[1] or a_format.element != "e2m1":
        return False
    return INTERPRETED or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) in _CHIPS
    )


def e2m1_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_global: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global: Tensor | None,
    fmt: Format,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize(a) @ dequantize(weight)^T + bias`` [M, N] in `dtype`; a bytes uint8 [M, K / 2].

    Both operands are read as `fmt`, see `takes_e2m1`.

    Raises:
        KernelError, FormatError: shapes, dtypes or formats do not fit.
    """
    count, channels = a.shape[0], a.shape[1] * 2
    check_packed(weight, weight_scale, weight_global, fmt, channels)
    check_scale("scale", a_scale, count, channels, fmt)
    a_scale = a_scale.contiguous()
    columns = weight.shape[0]
    out = torch.empty((count, columns), dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    a = a if a.stride(-1) == 1 else a.contiguous()
    block_m, block_n = (16, 32) if INTERPRETED else (128, 128)
    with on_device_of(a):
        launch(_e2m1_gemm_kernel)[(ceil_div(columns, block_n), row_blocks(count, block_m))](
            a,
            storage_bytes(a_scale),
            a_global,
            weight,
            storage_bytes(weight_scale),
            weight_global,
            bias,
            out,
            count,
            columns,
            a.stride(0),
            a_scale.stride(0),
            weight.stride(0),
            weight_scale.stride(0),
            K=channels,
            SCALE=fmt.stored_scale,
            GROUP=fmt.group_size,
            HAS_A_GLOBAL=a_global is not None,
            HAS_B_GLOBAL=weight_global is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=128,
            num_warps=4,
            num_stages=3,
        )
    return out
