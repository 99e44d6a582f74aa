"""Device functions that reorder and rotate rows held on chip: a gather, the block Hadamard transform.

Rows of 16 bits are rotated by tensor cores: one `tl.dot` of [groups, SIZE] with the +-1 Hadamard
matrix, whose products are exact; sums are fp32. Others follow the butterflies of
`pq_fx.kernels.reference.rotate` step by step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.rounding import float_of
from pq_fx.kernels.rows import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def hadamard_signs(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Sylvester's Hadamard matrix [SIZE, SIZE] of +-1 in a float DTYPE; SIZE up to 128.

    Sizes of 16 and 64 have entries +-1/4 and +-1/8, for the normalization by 1 / sqrt(SIZE).

    Entry (i, j) is -1 where i & j has an odd number of bits. The parities of 32 columns of a row
    are one word, made once a row.
    """
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    word = tl.where((i & 1) != 0, -1431655766, 0)  # 0xAAAAAAAA: columns whose bit 0 is set
    word ^= tl.where((i & 2) != 0, -858993460, 0)
    word ^= tl.where((i & 4) != 0, -252645136, 0)
    word ^= tl.where((i & 8) != 0, -16711936, 0)
    word ^= tl.where((i & 16) != 0, -65536, 0)
    odd = word >> (j & 31)
    if SIZE > 32:
        odd ^= (i >> 5) & (j >> 5)
    if SIZE > 64:
        odd ^= (i >> 6) & (j >> 6)
    one: tl.constexpr = 0x3E800000 if SIZE == 16 else (0x3E000000 if SIZE == 64 else 0x3F800000)
    return float_of(((odd & 1) << 31) | one).to(DTYPE)


@triton.jit
def gather_row(
    y,
    perm_ptr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """y [1, HEAD] in the order of perm int32 [CHANNELS], through shared memory; one row, one piece."""
    tl.static_assert(ROWS == 1 and TAIL == 0)
    at = tl.arange(0, HEAD)
    source = tl.load(perm_ptr + at, mask=at < CHANNELS, other=0)
    source = tl.where(at < CHANNELS, source, at)
    return tl.reshape(tl.gather(tl.reshape(y, [HEAD]), source, 0), [1, HEAD])


@triton.jit
def rotate(y, ROWS: tl.constexpr, LENGTH: tl.constexpr, SIZE: tl.constexpr, BY_DOT: tl.constexpr):
    """Block Hadamard of rows y [ROWS, LENGTH]; fp32 out.

    BY_DOT: on tensor cores, y of 16 bits. Else by butterflies in the order of `reference.rotate`.
    """
    if BY_DOT:
        dtype: tl.constexpr = tl.float32 if _INTERPRETED else y.dtype
        blocks = tl.reshape(y, [ROWS * LENGTH // SIZE, SIZE]).to(dtype)
        y = tl.dot(blocks, hadamard_signs(SIZE, dtype), input_precision="ieee")
    else:
        y = y.to(tl.float32)
        for i in tl.static_range(SIZE.bit_length() - 1):
            pairs = tl.reshape(y, [ROWS * LENGTH // (2 << i), 2, 1 << i])
            a, b = tl.split(tl.permute(pairs, [0, 2, 1]))
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS * LENGTH])
    y = tl.reshape(y, [ROWS, LENGTH])
    if BY_DOT and (SIZE == 16 or SIZE == 64):
        return y
    else:
        return y * (SIZE**-0.5)
