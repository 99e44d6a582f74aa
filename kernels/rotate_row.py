"""Device functions that reorder and rotate rows held on chip: a gather, the block Hadamard transform.

Rows of 16 bits are rotated by tensor cores: one `tl.dot` of [groups, SIZE] with the +-1 Hadamard
matrix (for 64 a smaller one, and butterflies), whose products are exact; sums are fp32. Others follow
the butterflies of `pq_fx.kernels.reference.rotate` step by step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.rounding import float_of
from pq_fx.kernels.rows import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
# Two neighbors of one row $2 and of another $3 as two words, a channel each: the first row in the low halves.
_PAIR = tl.constexpr("prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;")


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
def _side_by_side(a, b):
    """Rows [R, N] and [R, N] as [R, 2N]."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _whole_row(head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """head [R, HEAD] and tail [R, TAIL] one behind the other; copies of the tail fill up to 2 * HEAD."""
    if TAIL > 0:
        for _ in tl.static_range((HEAD // TAIL).bit_length() - 1):
            tail = _side_by_side(tail, tail)
        return _side_by_side(head, tail)
    else:
        return head


@triton.jit
def _halves(rows):
    """Rows [R, 2N] as [R, N] and [R, N]."""
    return tl.split(tl.permute(tl.reshape(rows, [rows.shape[0], 2, rows.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _even_and_odd(rows):
    """Rows [2P, N] as their even and odd ones, [P, N] each."""
    return tl.split(tl.permute(tl.reshape(rows, [rows.shape[0] // 2, 2, rows.shape[1]]), [0, 2, 1]))


@triton.jit
def _words(rows):
    """Rows [2P, N] of 16 bits as int32 [P, N]: an even row in the low halves, the odd one after it in the high ones."""
    even, odd = _even_and_odd(rows)
    if _INTERPRETED:
        low = even.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (odd.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return tl.inline_asm_elementwise(
            _PAIR,
            "=r,=r,r,r",
            [even, odd],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _rows_of_words(words, DTYPE: tl.constexpr, BY_DOT: tl.constexpr):
    """What `_words` packed: rows [2P, N] of a 16-bit DTYPE where a dot comes next, else fp32."""
    if BY_DOT or tl.bfloat16 != DTYPE:
        even = words.to(tl.int16).to(DTYPE, bitcast=True)
        odd = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        even = float_of(words << 16)
        odd = float_of(words & -65536)
    rows = tl.permute(tl.join(even, odd), [0, 2, 1])
    rows = tl.reshape(rows, [2 * words.shape[0], words.shape[1]])
    if _INTERPRETED or not BY_DOT:
        return rows
    else:
        # Nothing is done here, but Triton would take a join before a dot for one of a 4-bit operand and
        # lay the rows out for that.
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [rows], dtype=rows.dtype, is_pure=False, pack=2
        )


@triton.jit
def _source(
    perm_ptr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """perm[FIRST : FIRST + LENGTH] for every row [ROWS, LENGTH], or pair of rows; 0 beyond CHANNELS."""
    at = FIRST + tl.arange(0, LENGTH)[None, :]
    # With the rows' shape, so that it comes in their layout.
    source = tl.load(tl.broadcast_to(perm_ptr + at, [ROWS, LENGTH]), mask=at < CHANNELS, other=0)
    if PAIRED:
        source, _odd = _even_and_odd(source)
    return source


@triton.jit
def _gather(rows, source):
    """rows [R, N] of 16 or 32 bits at source [R, N], through shared memory.

    A thread holds 16 neighbors and stores 16 bytes at a time. So that the stores of a warp do not
    meet in a bank, the first 16 bytes of all threads lie in a row, then the second, and so on. Flat,
    because a gather along the second axis would be made of shuffles.
    """
    TOTAL: tl.constexpr = rows.shape[0] * rows.shape[1]
    CHUNK: tl.constexpr = 128 // rows.dtype.primitive_bitwidth
    flat = tl.reshape(rows, [TOTAL // 16, 16 // CHUNK, CHUNK])
    flat = tl.reshape(tl.permute(flat, [1, 0, 2]), [TOTAL])
    if rows.shape[0] > 1:
        source += tl.arange(0, rows.shape[0])[:, None] * rows.shape[1]
    place = (source & (CHUNK - 1)) | ((source >> 4) * CHUNK)
    place |= (source & (16 - CHUNK)) * (TOTAL // 16)
    return tl.reshape(tl.gather(flat, tl.reshape(place, [TOTAL]), 0), rows.shape)


@triton.jit
def gather_rows(
    head,
    tail,
    perm_ptr,
    CHANNELS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BY_DOT: tl.constexpr,
):
    """head [R, HEAD] and tail [R, TAIL] in the order of perm int32 [CHANNELS], through shared memory.

    Two rows of 16 bits go as one of 32, so that one read serves both. BY_DOT: rows of 16 bits stay
    so, for `rotate`; else they may come as fp32.
    """
    DTYPE: tl.constexpr = head.dtype
    ROWS: tl.constexpr = head.shape[0]
    PAIRED: tl.constexpr = DTYPE.primitive_bitwidth == 16 and ROWS % 2 == 0
    source = _source(perm_ptr, ROWS, 0, HEAD, CHANNELS, PAIRED)
    source_tail = source
    if TAIL > 0:
        source_tail = _source(perm_ptr, ROWS, HEAD, TAIL, CHANNELS, PAIRED)
    source = _whole_row(source, source_tail, HEAD, TAIL)
    if PAIRED:
        head = _words(head)
        tail = _words(tail)
    row = _gather(_whole_row(head, tail, HEAD, TAIL), source)
    if row.shape[1] > CHANNELS:
        inside = tl.arange(0, row.shape[1]) < CHANNELS
        row = tl.where(inside[None, :], row, tl.zeros_like(row))
    rest = row
    if TAIL > 0:
        row, rest = _halves(row)
        for _ in tl.static_range((HEAD // TAIL).bit_length() - 1):
            rest, _copy = _halves(rest)
    if PAIRED:
        row = _rows_of_words(row, DTYPE, BY_DOT)
        rest = _rows_of_words(rest, DTYPE, BY_DOT)
    return row, rest


@triton.jit
def _rotate_64(y, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """`rotate` in blocks of 64 that moves no data between threads: a dot of 16 columns, and butterflies.

    A thread loads and stores 16 neighboring channels, so four threads hold a block. In the operands
    of tensor cores four threads hold 16 columns: thread t columns 2t, 2t + 1, 8 + 2t and 9 + 2t. So
    the dot takes two bits of a channel's number inside the thread and both bits of the thread; the
    two bits that are left are butterflies of fp32 in the thread's own registers.
    """
    dtype: tl.constexpr = tl.float32 if _INTERPRETED else y.dtype
    PARTS: tl.constexpr = ROWS * LENGTH // 512
    # A channel is 16 thread + 8 high + 4 low + 2 upper + lower; a column 8 upper + 2 thread + lower.
    y = tl.reshape(y, [PARTS, 8, 4, 2, 2, 2, 2])
    y = tl.reshape(tl.permute(y, [3, 0, 4, 1, 5, 2, 6]), [PARTS * 32, 16]).to(dtype)
    y = tl.dot(y, hadamard_signs(16, dtype) * 0.5, input_precision="ieee")
    y = tl.permute(tl.reshape(y, [2, PARTS, 2, 8, 2, 4, 2]), [1, 3, 5, 4, 6, 2, 0])
    a, b = tl.split(y)
    c, d = tl.split(a + b)
    e, f = tl.split(a - b)
    y = tl.join(tl.join(c + d, c - d), tl.join(e + f, e - f))
    # What was joined last lies next to each other in registers. Split and joined again, the two bits
    # of neighbors do, so that four bytes of codes make a word where they are.
    y = tl.permute(y, [0, 1, 2, 6, 5, 4, 3])
    a, b = tl.split(y)
    y = tl.permute(tl.join(a, b), [0, 1, 2, 3, 4, 6, 5])
    a, b = tl.split(y)
    y = tl.join(a, b)
    return tl.reshape(y, [ROWS, LENGTH])


@triton.jit
def rotate(y, ROWS: tl.constexpr, LENGTH: tl.constexpr, SIZE: tl.constexpr, BY_DOT: tl.constexpr):
    """Block Hadamard of rows y [ROWS, LENGTH]; fp32 out.

    BY_DOT: on tensor cores, y of 16 bits. Else by butterflies in the order of `reference.rotate`.
    """
    if BY_DOT and SIZE == 64 and ROWS * LENGTH >= 512:
        y = _rotate_64(y, ROWS, LENGTH)
    elif BY_DOT:
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
