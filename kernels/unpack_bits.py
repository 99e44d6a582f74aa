"""Device functions that turn packed codes into 16-bit floats by bit moves, four bytes at a time.

Element values have at most 8 significant bits, so bf16 and fp16 hold them exactly. A 4-bit code
costs 2.5 instructions: two codes are moved apart into the halves of a word, or-ed into the mantissa
of 128 (fp16: 1024), and the constant is subtracted from both at once; int4f and int3f are
offset binary, so that constant is their zero and no sign is left. e2m1's exponent is moved into that
of a tiny float and scaled up exactly. int3's magnitudes already lie two to a word. Triton's
interpreter has no inline assembly; there, and for 8 bits, the values of `codes.code_value` are
converted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pq_fx.kernels.codes import code_value
from pq_fx.kernels.rows import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


def _assembly(magnitude: str, kind: str, factor: int, addend: int, signed: bool = True) -> str:
    """PTX for four bytes $4: low nibbles to $0, $1 and high nibbles to $2, $3, two values a word.

    magnitude: from a word `n` of nibbles (bits 0 to 3 of each half; garbage above) to the word `m`
    of unsigned floats of `kind`, which are multiplied by `factor` and added to `addend` (words).
    signed: bit 3 of a nibble is the sign.
    """
    lines = [
        ".reg .b32 a, b, m, s, n, f, c;",
        f"mov.b32 f, {factor:#010x};",
        f"mov.b32 c, {addend:#010x};",
        "prmt.b32 a, $4, 0, 0x4140;",
        "prmt.b32 b, $4, 0, 0x4342;",
    ]
    for out, word, shift, sign in (
        ("$0", "a", 0, 12),
        ("$1", "b", 0, 12),
        ("$2", "a", 4, 8),
        ("$3", "b", 4, 8),
    ):
        lines += [
            f"shr.u32 n, {word}, {shift};",
            magnitude,
            f"fma.rn.{kind} {'m' if signed else out}, m, f, c;",
        ]
        if signed:
            lines += [
                f"shl.b32 s, {word}, {sign};",
                f"lop3.b32 {out}, m, s, 0x80008000, 0x78;",  # m ^ (s & mask)
            ]
    return "{ " + " ".join(lines) + " }"


def _assembly_int3(kind: str, exponent: int, factor: int, addend: int, signed: bool = True) -> str:
    """PTX for four times eight channels: magnitudes $16, $17 and signs $18 to $0 ... $15.

    A word of magnitudes holds two times eight channels of two bits, so channel i of both is one
    shift away; $2i, $2i + 1 are the four values of channel i, two a word. Not signed: the "signs" are
    bit 2 of a code.
    """
    lines = [
        ".reg .b32 p, q, m, s, f, c, e;",
        f"mov.b32 f, {factor:#010x};",
        f"mov.b32 c, {addend:#010x};",
        f"mov.b32 e, {exponent:#010x};",
        # Each byte of signs in the upper half of 16 bits.
        "prmt.b32 p, $18, 0, 0x1404;",
        "prmt.b32 q, $18, 0, 0x3424;",
    ]
    for i in range(8):
        for half, signs in enumerate("pq"):
            lines += [
                f"shr.u32 m, ${16 + half}, {2 * i};",
                "lop3.b32 m, m, 0x00030003, e, 0xEA;",
            ]
            if signed:
                lines += [
                    f"fma.rn.{kind} m, m, f, c;",
                    f"shl.b32 s, {signs}, {7 - i};",
                    f"lop3.b32 ${2 * i + half}, m, s, 0x80008000, 0x78;",
                ]
            else:
                lines += [
                    f"shr.u32 s, {signs}, {6 + i};",
                    "lop3.b32 m, m, s, 0x00040004, 0xF8;",  # m | (s & mask)
                    f"fma.rn.{kind} ${2 * i + half}, m, f, c;",
                ]
    return "{ " + " ".join(lines) + " }"


# n & 7 | exponent of 128 (1024), as one LOP3 (0xEA: a & b | c), then minus 128 (1024).
_INT4_BF16 = tl.constexpr(
    _assembly("lop3.b32 m, n, 0x00070007, 0x43004300, 0xEA;", "bf16x2", 0x3F803F80, 0xC300C300)
)
_INT4_FP16 = tl.constexpr(
    _assembly("lop3.b32 m, n, 0x00070007, 0x64006400, 0xEA;", "f16x2", 0x3C003C00, 0xE400E400)
)
_INT3_BF16 = tl.constexpr(_assembly_int3("bf16x2", 0x43004300, 0x3F803F80, 0xC300C300))
_INT3_FP16 = tl.constexpr(_assembly_int3("f16x2", 0x64006400, 0x3C003C00, 0xE400E400))
# Minus 136 (1032): 128 (1024) and the 8 of offset binary; int3f's is 4.
_INT4F_BF16 = tl.constexpr(
    _assembly(
        "lop3.b32 m, n, 0x000F000F, 0x43004300, 0xEA;", "bf16x2", 0x3F803F80, 0xC308C308, False
    )
)
_INT4F_FP16 = tl.constexpr(
    _assembly(
        "lop3.b32 m, n, 0x000F000F, 0x64006400, 0xEA;", "f16x2", 0x3C003C00, 0xE408E408, False
    )
)
_INT3F_BF16 = tl.constexpr(_assembly_int3("bf16x2", 0x43004300, 0x3F803F80, 0xC304C304, False))
_INT3F_FP16 = tl.constexpr(_assembly_int3("f16x2", 0x64006400, 0x3C003C00, 0xE404E404, False))
# Exponent and mantissa of e2m1 read 2^-126 (2^-14) too small in place, the subnormal included.
_E2M1_BF16 = tl.constexpr(
    _assembly("and.b32 m, n, 0x00070007; shl.b32 m, m, 6;", "bf16x2", 0x7E807E80, 0x80008000)
)
_E2M1_FP16 = tl.constexpr(
    _assembly("and.b32 m, n, 0x00070007; shl.b32 m, m, 9;", "f16x2", 0x74007400, 0x80008000)
)
# Types of what comes out, as many as there are outputs.
_TWO_BF16 = tl.constexpr((tl.bfloat16,) * 2)
_TWO_FP16 = tl.constexpr((tl.float16,) * 2)
_EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
_EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)


@triton.jit
def unpack_nibbles(packed, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """Values of the low and of the high nibbles of `packed` (uint8), two tensors of DTYPE."""
    if _INTERPRETED:
        low = code_value(packed & 15, ELEMENT).to(DTYPE)
        high = code_value(packed >> 4, ELEMENT).to(DTYPE)
    else:
        is_bf16: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300
        int4: tl.constexpr = _INT4_BF16 if is_bf16 else _INT4_FP16
        int4f: tl.constexpr = _INT4F_BF16 if is_bf16 else _INT4F_FP16
        e2m1: tl.constexpr = _E2M1_BF16 if is_bf16 else _E2M1_FP16
        low, high = tl.inline_asm_elementwise(
            int4 if ELEMENT == "int4" else int4f if ELEMENT == "int4f" else e2m1,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=_TWO_BF16 if is_bf16 else _TWO_FP16,
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def unpack_eights(magnitude, sign, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """int3, int3f: eight tensors of DTYPE, the channels of magnitudes (int16) and signs (uint8)."""
    if _INTERPRETED:
        m, s = magnitude.to(tl.int32), sign.to(tl.int32)
        return (
            _int3_value(m, s, ELEMENT, 0).to(DTYPE),
            _int3_value(m, s, ELEMENT, 1).to(DTYPE),
            _int3_value(m, s, ELEMENT, 2).to(DTYPE),
            _int3_value(m, s, ELEMENT, 3).to(DTYPE),
            _int3_value(m, s, ELEMENT, 4).to(DTYPE),
            _int3_value(m, s, ELEMENT, 5).to(DTYPE),
            _int3_value(m, s, ELEMENT, 6).to(DTYPE),
            _int3_value(m, s, ELEMENT, 7).to(DTYPE),
        )
    else:
        is_bf16: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300
        int3: tl.constexpr = _INT3_BF16 if is_bf16 else _INT3_FP16
        int3f: tl.constexpr = _INT3F_BF16 if is_bf16 else _INT3F_FP16
        return tl.inline_asm_elementwise(
            int3f if ELEMENT == "int3f" else int3,
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [magnitude, sign],
            dtype=_EIGHT_BF16 if is_bf16 else _EIGHT_FP16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def multiply_pairs(x, y):
    """x * y of 16-bit floats, rounded once, two at a time; sm_80 has no product of bf16 but in fma."""
    if _INTERPRETED:
        return x * y
    else:
        kind: tl.constexpr = "bf16x2" if x.dtype == tl.bfloat16 else "f16x2"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn." + kind + " $0, $1, $2, z; }",
            "=r,r,r",
            [x, y],
            dtype=x.dtype,
            is_pure=True,
            pack=2,
        )


@triton.jit
def load_values(
    base,
    first,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Element values [ROWS, COUNT] in DTYPE of channels first to first + COUNT of packed rows.

    base: pointers [ROWS, 1] to the rows; zeros beyond CHANNELS. `first` is a multiple of COUNT.
    """
    if ELEMENT == "int4" or ELEMENT == "int4f" or ELEMENT == "e2m1":
        byte = first // 2 + tl.arange(0, COUNT // 2)[None, :]
        packed = tl.load(base + byte, mask=byte < CHANNELS // 2, other=0)
        low, high = unpack_nibbles(packed, ELEMENT, DTYPE)
        return tl.reshape(tl.join(low, high), [ROWS, COUNT])
    elif ELEMENT == "int3" or ELEMENT == "int3f":
        # Eight channels are 16 bits of magnitudes and 8 of signs; a row has an even number of bytes.
        eight = first // 8 + tl.arange(0, COUNT // 8)[None, :]
        mask = eight < CHANNELS // 8
        words = base.to(tl.pointer_type(tl.int16), bitcast=True)
        magnitude = tl.load(words + eight, mask=mask, other=0)
        sign = tl.load(base + CHANNELS // 4 + eight, mask=mask, other=0)
        v = unpack_eights(magnitude, sign, ELEMENT, DTYPE)
        # Joined so that the eight come out in order: the bits of their number, lowest last.
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
        return tl.reshape(tl.join(even, odd), [ROWS, COUNT])
    else:
        channel = first + tl.arange(0, COUNT)[None, :]
        code = tl.load(base + channel, mask=channel < CHANNELS, other=0)
        return code_value(code, ELEMENT).to(DTYPE)


@triton.jit
def _int3_value(magnitude, sign, ELEMENT: tl.constexpr, i: tl.constexpr):
    return code_value(((magnitude >> (2 * i)) & 3) | (((sign >> i) & 1) << 2), ELEMENT)
