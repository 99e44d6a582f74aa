"""What the GEMMs share: the end of their kernels, and blocks of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.rows import MAX_BATCH, ceil_div, require


@triton.jit
def store_output(
    sums,
    rows,
    columns,
    M,
    N,
    a_global_ptr,
    b_global_ptr,
    bias_ptr,
    out_ptr,
    HAS_A_GLOBAL: tl.constexpr,
    HAS_B_GLOBAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Multiply fp32 sums [BM, BN] by the global scales, add the bias [N], store to out [M, N]."""
    if HAS_A_GLOBAL:
        sums *= tl.load(a_global_ptr).to(tl.float32)
    if HAS_B_GLOBAL:
        sums *= tl.load(b_global_ptr).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        sums += bias[None, :]
    out = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)


def row_blocks(count: int, block: int) -> int:
    """Blocks of rows, a grid's second axis; raises KernelError for more rows than it has room for."""
    require(
        count <= MAX_BATCH * block,
        f"{count} rows; a launch takes {MAX_BATCH * block}: split the batch",
    )
    return ceil_div(count, block)
