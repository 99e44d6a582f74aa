"""Device functions that turn packed codes into 16-bit floats by bit moves, four bytes at a time.

Element values have at most 8 significant bits, so bf16 and fp16 hold them exactly. Two codes are
moved apart into the halves of a word, or-ed into the mantissa of 128 (fp16: 1024) where they stand,
and one fused multiply-add of both brings them to their size and takes the constant away; int4f's and
int3f's zero is in that constant, the others' sign is put in. e2m1's exponent is moved into that of a
tiny float and scaled up exactly. int3's magnitudes already lie two to a word. Triton's interpreter
has no inline assembly; there, and for 8 bits, the values of `codes.code_value` are converted.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from pq_fx.kernels.codes import code_value, packed_bits
from pq_fx.kernels.rows import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


# 128 in bf16 and 1024 in fp16: the lowest bit of their mantissas counts 1.
_ONE = {"bf16x2": 128.0, "f16x2": 1024.0}


def _pair(value: float, kind: str) -> str:
    """The word with two floats of this value."""
    packed = struct.pack(">f", value)[:2] if kind == "bf16x2" else struct.pack(">e", value)
    return f"{int.from_bytes(packed, 'big') * 0x10001:#010x}"


def _assembly(element: str, kind: str) -> tl.constexpr:
    """PTX for four bytes $4: low nibbles to $0, $1 and high nibbles to $2, $3, two values a word.

    Magnitudes are or-ed into the mantissa of 128 (1024) where they stand in their byte: high ones
    count sixteen times. int4f's have a bit more, for which bf16 has no room there.
    """
    one = _ONE[kind]
    lines = [
        ".reg .b32 a, b, m, s, f, c, e;",
        f"mov.b32 e, {_pair(one, kind)};",
        "prmt.b32 a, $4, 0, 0x4140;",
        "prmt.b32 b, $4, 0, 0x4342;",
    ]
    for shift, outputs in ((0, ("$0", "$1")), (4, ("$2", "$3"))):
        mask = f"{0x00070007 << shift:#010x}"
        factor, addend = 2.0**-shift, -one * 2.0**-shift
        if element == "int4f":
            factor, addend = 1.0, -one - 8.0
        elif element == "e2m1":  # exponent and mantissa in their place read so much too small
            factor, addend = 2.0 ** (126 if kind == "bf16x2" else 14), -0.0
        lines += [f"mov.b32 f, {_pair(factor, kind)};", f"mov.b32 c, {_pair(addend, kind)};"]
        for out, word in zip(outputs, "ab", strict=True):
            if element == "int4f":
                lines += [
                    f"shr.u32 m, {word}, {shift};",
                    "lop3.b32 m, m, 0x000F000F, e, 0xEA;",
                    f"fma.rn.{kind} {out}, m, f, c;",
                ]
                continue
            if element == "int4":
                lines += [f"lop3.b32 m, {word}, {mask}, e, 0xEA;"]  # word & mask | e
            else:
                place = 6 if kind == "bf16x2" else 9
                lines += [f"and.b32 m, {word}, {mask};", f"shl.b32 m, m, {place - shift};"]
            lines += [
                f"fma.rn.{kind} m, m, f, c;",
                f"shl.b32 s, {word}, {12 - shift};",
                f"lop3.b32 {out}, m, s, 0x80008000, 0x78;",  # m ^ (s & mask)
            ]
    return tl.constexpr("{ " + " ".join(lines) + " }")


def _assembly_3_bits(element: str, kind: str) -> tl.constexpr:
    """PTX for four times eight channels: magnitudes $16, $17 and signs $18 to $0 ... $15.

    A word of magnitudes holds two times eight channels of two bits; $2i, $2i + 1 are the four values
    of channel i, two a word. Three channels at a time are or-ed into mantissas without a shift: the
    second counts four times, the third sixteen times. int3f: the "signs" are bit 2 of a code.
    """
    one, signed = _ONE[kind], element == "int3"
    lines = [".reg .b32 p, q, m, s, e, n<2>, f<3>, c<3>;", f"mov.b32 e, {_pair(one, kind)};"]
    for j in range(3):
        addend = -one * 4.0**-j - (0.0 if signed else 4.0)
        lines += [f"mov.b32 f{j}, {_pair(4.0**-j, kind)};", f"mov.b32 c{j}, {_pair(addend, kind)};"]
    # Each byte of signs in the upper half of 16 bits, or in the lower one.
    for word, selected in zip(
        "pq", ("0x1404", "0x3424") if signed else ("0x4140", "0x4342"), strict=True
    ):
        lines.append(f"prmt.b32 {word}, $18, 0, {selected};")
    for i in range(8):
        j = i % 3
        for half, signs in enumerate("pq"):
            if j == 0:
                lines.append(f"shr.u32 n{half}, ${16 + half}, {2 * i};")
            out = f"${2 * i + half}"
            lines.append(f"lop3.b32 m, n{half}, {0x00030003 << 2 * j:#010x}, e, 0xEA;")
            if signed:
                lines += [
                    f"fma.rn.{kind} m, m, f{j}, c{j};",
                    f"shl.b32 s, {signs}, {7 - i};",
                    f"lop3.b32 {out}, m, s, 0x80008000, 0x78;",
                ]
            else:
                up = 2 * j + 2 - i
                lines += [
                    f"{'shl.b32' if up >= 0 else 'shr.u32'} s, {signs}, {abs(up)};",
                    f"lop3.b32 m, m, s, {0x00040004 << 2 * j:#010x}, 0xF8;",  # m | (s & mask)
                    f"fma.rn.{kind} {out}, m, f{j}, c{j};",
                ]
    return tl.constexpr("{ " + " ".join(lines) + " }")


_INT4_BF16, _INT4_FP16 = _assembly("int4", "bf16x2"), _assembly("int4", "f16x2")
_INT4F_BF16, _INT4F_FP16 = _assembly("int4f", "bf16x2"), _assembly("int4f", "f16x2")
_E2M1_BF16, _E2M1_FP16 = _assembly("e2m1", "bf16x2"), _assembly("e2m1", "f16x2")
_INT3_BF16, _INT3_FP16 = _assembly_3_bits("int3", "bf16x2"), _assembly_3_bits("int3", "f16x2")
_INT3F_BF16, _INT3F_FP16 = _assembly_3_bits("int3f", "bf16x2"), _assembly_3_bits("int3f", "f16x2")
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
    if packed_bits(ELEMENT) == 4:
        byte = first // 2 + tl.arange(0, COUNT // 2)[None, :]
        packed = tl.load(base + byte, mask=byte < CHANNELS // 2, other=0)
        low, high = unpack_nibbles(packed, ELEMENT, DTYPE)
        return tl.reshape(tl.join(low, high), [ROWS, COUNT])
    elif packed_bits(ELEMENT) == 3:
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
