"""Triton kernel that rounds the columns of one group one after the other, as `pq_fx.passes.rounding` defines it.

In PyTorch every column costs five launches, for which a GPU waits; here a group costs one. A program holds
some of the weight's rows: what the columns lost so far is a tile in registers, from which each column takes
its share when its turn comes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_fx.kernels.launch import launch
from pq_fx.kernels.rows import ceil_div, on_device_of, power_of_2, require


@triton.jit
def _round_columns_kernel(
    block_ptr,
    within_ptr,
    factor_ptr,
    values_ptr,
    bounds_ptr,
    index_ptr,
    errors_ptr,
    N,
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    column = tl.arange(0, PADDED)
    factor = tl.load(factor_ptr + n, mask=inside, other=1.0)
    divisor = tl.where(factor != 0, factor, 1.0)
    lost = tl.zeros([PADDED, BLOCK_N], tl.float32)
    for j in range(COLUMNS):
        # Above the diagonal: only columns before j have a share.
        share = tl.load(
            within_ptr + column * row_stride + j * column_stride, mask=column < j, other=0.0
        )
        now = tl.load(block_ptr + j * N + n, mask=inside, other=0.0)
        now -= tl.sum(lost * share[:, None], axis=0)
        scaled = now / divisor
        index = tl.zeros([BLOCK_N], tl.int32)
        if BOUNDS <= 16:
            for b in tl.static_range(BOUNDS):
                index += (scaled > tl.load(bounds_ptr + b)).to(tl.int32)
        else:
            for b in range(BOUNDS):
                index += (scaled > tl.load(bounds_ptr + b)).to(tl.int32)
        error = now - tl.load(values_ptr + index) * factor
        tl.store(index_ptr + j * N + n, index, mask=inside)
        tl.store(errors_ptr + j * N + n, error, mask=inside)
        lost = tl.where((column == j)[:, None], error[None, :], lost)


def round_columns(
    block: Tensor,
    within: Tensor,
    factor: Tensor,
    values: Tensor,
    bounds: Tensor,
    index: Tensor,
    errors: Tensor,
) -> None:
    """`pq_fx.passes.rounding.round_columns` in one launch; `block` is left as it is.

    block fp32 [b, N], within fp32 [b, b] (any strides: a GPU's triangular solve gives columns), factor fp32 [N],
    values fp32 [v], bounds fp32 [v - 1];
    index int32 [b, N] and errors fp32 [b, N] are written. Raises KernelError for other shapes, dtypes or strides.
    """
    columns, count = block.shape
    for name, given, dtype, shape in (
        ("block", block, torch.float32, (columns, count)),
        ("within", within, torch.float32, (columns, columns)),
        ("factor", factor, torch.float32, (count,)),
        ("values", values, torch.float32, (len(bounds) + 1,)),
        ("bounds", bounds, torch.float32, (len(bounds),)),
        ("index", index, torch.int32, (columns, count)),
        ("errors", errors, torch.float32, (columns, count)),
    ):
        require(
            given.dtype == dtype and tuple(given.shape) == shape,
            f"round_columns: {name} is {given.dtype} {list(given.shape)}, expected {dtype} {list(shape)}",
        )
        require(
            name == "within" or given.is_contiguous(), f"round_columns: {name} is not contiguous"
        )
    padded = max(16, power_of_2(columns))
    # A tile of 16 registers a thread.
    block_n = max(16, 2048 // padded)
    with on_device_of(block):
        launch(_round_columns_kernel)[(ceil_div(count, block_n),)](
            block,
            within,
            factor,
            values,
            bounds,
            index,
            errors,
            count,
            *within.stride(),
            COLUMNS=columns,
            PADDED=padded,
            BOUNDS=len(bounds),
            BLOCK_N=block_n,
            num_warps=4,
        )
