"""Triton GEMM that dequantizes inside: any activation by any packed weight, any shape, any chip.

Element values (at most 8 significant bits) are exact in bf16, so products of quantized elements are
exact on 16-bit tensor cores; group scales multiply the fp32 partial sums, one group of K at a time.
This is the path of carrier "codes" and of every pair of formats that `gemm_int8` and `gemm_e2m1` do
not take. Where a chip has fp8 tensor cores, `pq_fx.kernels.gemm_fp8` is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.carriers import int8_unit
from pq_fx.kernels.codes import code_value, load_code, scale_value
from pq_fx.kernels.decode import check_packed
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_output import row_blocks, store_output
from pq_fx.kernels.launch import launch
from pq_fx.kernels.pack import channels_of
from pq_fx.kernels.rounding import as_bytes
from pq_fx.kernels.rows import (
    INTERPRETED,
    ceil_div,
    check_scale,
    on_device_of,
    require,
    storage_bytes,
)


@triton.jit
def _dequantizing_gemm_kernel(
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
    A_ELEMENT: tl.constexpr,
    A_PACKED: tl.constexpr,
    A_STEP: tl.constexpr,
    A_SCALE: tl.constexpr,
    A_GROUP: tl.constexpr,
    HAS_A_GLOBAL: tl.constexpr,
    B_ELEMENT: tl.constexpr,
    B_SCALE: tl.constexpr,
    B_GROUP: tl.constexpr,
    HAS_B_GLOBAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a [M, K] code points uint8 (A_ELEMENT) or float (A_ELEMENT "float"); b packed uint8 [N, ...].

    A_PACKED: a is packed like b. A_STEP: an element is A_STEP times what its code point stands for.

    a_scale [M, K / A_GROUP], b_scale [N, K / B_GROUP], group 0 = one a row; out [M, N] in its
    dtype. BLOCK_K divides both groups. DOT: dtype of the operands of `tl.dot`.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    column_mask = columns < N
    a_rows = a_ptr + rows.to(tl.int64)[:, None] * a_stride
    b_rows = b_ptr + columns.to(tl.int64)[None, :] * b_stride
    if A_ELEMENT != "float":
        if A_SCALE == "e4m3":
            a_scale_ptr = as_bytes(a_scale_ptr)
        a_scales = a_scale_ptr + rows.to(tl.int64) * a_scale_stride
    if B_SCALE == "e4m3":
        b_scale_ptr = as_bytes(b_scale_ptr)
    b_scales = b_scale_ptr + columns.to(tl.int64) * b_scale_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        inside = channel < K
        a_mask = row_mask[:, None] & inside[None, :]
        b_mask = column_mask[None, :] & inside[:, None]
        if A_ELEMENT == "float":
            a = tl.load(a_rows + channel[None, :], mask=a_mask, other=0.0).to(DOT)
        else:
            if A_PACKED:
                a_code = load_code(a_rows, channel[None, :], a_mask, K, A_ELEMENT)
            else:
                a_code = tl.load(a_rows + channel[None, :], mask=a_mask, other=0)
            a = code_value(a_code, A_ELEMENT).to(DOT)
        b_code = load_code(b_rows, channel[:, None], b_mask, K, B_ELEMENT)
        b = code_value(b_code, B_ELEMENT).to(DOT)
        partial = tl.dot(a, b, input_precision="ieee")
        b_group = start // B_GROUP if B_GROUP > 0 else 0
        b_scale = tl.load(b_scales + b_group, mask=column_mask, other=0)
        partial = partial * scale_value(b_scale, B_SCALE)[None, :]
        if A_ELEMENT != "float":
            a_group = start // A_GROUP if A_GROUP > 0 else 0
            a_scale = tl.load(a_scales + a_group, mask=row_mask, other=0)
            partial = partial * (scale_value(a_scale, A_SCALE) * A_STEP)[:, None]
        sums += partial
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


def dequantizing_gemm(
    a: Tensor,
    a_scale: Tensor | None,
    a_global: Tensor | None,
    a_format: Format | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global: Tensor | None,
    weight_format: Format,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``a @ dequantize(weight)^T + bias`` [M, N] in `dtype`; a [M, K] floats or quantized.

    a_format None: a is float16, bfloat16 or float32. Else a is uint8 or int8 of an exact carrier
    (`carriers`; packed e2m1 as its bytes [M, K / 2]) and a_scale [M, K / g] its stored scales.

    Raises:
        KernelError, FormatError: shapes, dtypes or formats do not fit.
    """
    count = a.shape[0]
    channels = channels_of(weight, weight_format)
    packed = a_format is not None and a.shape[1] * 2 == channels
    lattice = a.dtype == torch.int8
    require(
        packed or a.shape[1] == channels,
        f"rows of {a.shape[1]} channels do not fit a weight of {channels}",
    )
    check_packed(weight, weight_scale, weight_global, weight_format, channels)
    columns = weight.shape[0]
    out = torch.empty((count, columns), dtype=dtype, device=a.device)
    if a_format is not None:
        require(a_scale is not None, "code points came without their scales")
        assert a_scale is not None
        check_scale("scale", a_scale, count, channels, a_format)
        a_scale = a_scale.contiguous()
    if out.numel() == 0:
        return out
    few = count <= 16
    blocks = row_blocks(count, 16 if few else 64)
    if a.stride(-1) != 1:
        a = a.contiguous()
    groups = [f.group_size for f in (a_format, weight_format) if f is not None and f.group_size]
    # bf16 holds every element value exactly; float activations keep their own dtype.
    dot = {torch.float16: tl.float16, torch.float32: tl.float32}.get(a.dtype, tl.bfloat16)
    if INTERPRETED:
        dot = tl.float32
    with on_device_of(a):
        launch(_dequantizing_gemm_kernel)[(ceil_div(columns, 32 if few else 64), blocks)](
            a,
            None if a_scale is None else storage_bytes(a_scale),
            a_global,
            weight,
            storage_bytes(weight_scale),
            weight_global,
            bias,
            out,
            count,
            columns,
            a.stride(0),
            0 if a_scale is None else a_scale.stride(0),
            weight.stride(0),
            weight_scale.stride(0),
            K=channels,
            A_ELEMENT="float" if a_format is None else "int8" if lattice else a_format.element,
            A_PACKED=packed,
            A_STEP=1.0 / int8_unit(a_format) if a_format is not None and lattice else 1.0,
            A_SCALE="fp32" if a_format is None else a_format.stored_scale,
            A_GROUP=0 if a_format is None else a_format.group_size,
            HAS_A_GLOBAL=a_global is not None,
            B_ELEMENT=weight_format.element,
            B_SCALE=weight_format.stored_scale,
            B_GROUP=weight_format.group_size,
            HAS_B_GLOBAL=weight_global is not None,
            HAS_BIAS=bias is not None,
            DOT=dot,
            BLOCK_M=16 if few else 64,
            BLOCK_N=32 if few else 64,
            BLOCK_K=min([64, *groups]),
            num_warps=4,
            num_stages=3,
        )
    return out
