"""The inline PTX that unpacks codes, carried out instruction by instruction: Triton's interpreter skips it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from pq_fx.kernels import rotate_row, unpack_bits
from pq_fx.kernels.codes import full_range, packed_bits
from pq_fx.kernels.formats import FORMAT_NAMES, Format, get_format
from pq_fx.kernels.values import element_values

MASK = 0xFFFFFFFF


def bf16(bits: int) -> float:
    return float(struct.unpack("f", struct.pack("I", bits << 16))[0])


def fp16(bits: int) -> float:
    return float(struct.unpack("e", struct.pack("H", bits))[0])


def to_bf16(x: float) -> int:
    bits = struct.unpack("I", struct.pack("f", x))[0]
    assert bits & 0xFFFF == 0, f"{x} is not a bf16 number"
    return bits >> 16


def to_fp16(x: float) -> int:
    bits = struct.unpack("H", struct.pack("e", x))[0]
    assert fp16(bits) == x, f"{x} is not an fp16 number"
    return bits


KINDS: dict[str, tuple[Callable[[int], float], Callable[[float], int]]] = {
    "bf16x2": (bf16, to_bf16),
    "f16x2": (fp16, to_fp16),
}


def carry_out(ptx: str, registers: dict[str, int]) -> dict[str, int]:
    """Registers after the PTX: moves, shifts, prmt, lop3 and paired fma of 32-bit words."""
    state = dict(registers)

    def value(name: str) -> int:
        return state[name] if name in state else int(name, 0)

    for line in ptx.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        a = [value(source) for source in sources]
        if name == "mov.b32":
            result = a[0]
        elif name == "shr.u32":
            result = a[0] >> a[1]
        elif name == "shl.b32":
            result = a[0] << a[1] & MASK
        elif name == "and.b32":
            result = a[0] & a[1]
        elif name == "prmt.b32":
            source = (a[0] | a[1] << 32).to_bytes(8, "little")
            result = sum(source[a[2] >> 4 * i & 7] << 8 * i for i in range(4))
        elif name == "lop3.b32":
            result = {
                0xEA: a[0] & a[1] | a[2],
                0x78: a[0] ^ (a[1] & a[2]),
                0xF8: a[0] | (a[1] & a[2]),
            }[a[3]]
        else:
            read, write = KINDS[name.removeprefix("fma.rn.")]
            halves = [[read(x >> s & 0xFFFF) for x in a] for s in (0, 16)]
            result = sum(write(x * y + z) << 16 * i for i, (x, y, z) in enumerate(halves))
        state[target] = result
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("element", ["int4", "int4f", "e2m1"])
def test_four_bits(kind: str, element: str) -> None:
    name = f"_{element.upper()}_{'BF16' if kind == 'bf16x2' else 'FP16'}"
    read = KINDS[kind][0]
    fmt = Format.parse("mxfp4:32:e8m0" if element == "e2m1" else f"{element}:64:bf16")
    table = element_values(torch.arange(16, dtype=torch.uint8), fmt).tolist()
    for first in range(0, 256, 4):
        word = sum((first + i) << 8 * i for i in range(4))
        state = carry_out(getattr(unpack_bits, name).value, {"$4": word})
        for i in range(4):
            byte, half = first + i, 16 * (i % 2)
            assert read(state[f"${i // 2}"] >> half & 0xFFFF) == table[byte & 15]
            assert read(state[f"${2 + i // 2}"] >> half & 0xFFFF) == table[byte >> 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("element", ["int3", "int3f"])
def test_three_bits(kind: str, element: str) -> None:
    name = f"_{element.upper()}_{'BF16' if kind == 'bf16x2' else 'FP16'}"
    read, draw = KINDS[kind][0], random.Random(3)
    for _ in range(100):
        magnitudes = [draw.getrandbits(16) for _ in range(4)]
        signs = [draw.getrandbits(8) for _ in range(4)]
        registers = {
            "$16": magnitudes[0] | magnitudes[1] << 16,
            "$17": magnitudes[2] | magnitudes[3] << 16,
            "$18": sum(s << 8 * i for i, s in enumerate(signs)),
        }
        state = carry_out(getattr(unpack_bits, name).value, registers)
        for channel in range(8):
            for i in range(4):
                found = read(state[f"${2 * channel + i // 2}"] >> 16 * (i % 2) & 0xFFFF)
                low, high = magnitudes[i] >> 2 * channel & 3, signs[i] >> channel & 1
                if element == "int3":
                    assert found == (-low if high else low)
                else:
                    assert found == low + 4 * high - 4


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_kernels_know_what_the_format_says(name: str) -> None:
    fmt = get_format(name)
    assert packed_bits(fmt.element) == fmt.bits
    assert full_range(fmt.element) == fmt.full_range


def test_two_rows_become_words() -> None:
    """A channel of two rows is one word: what a gather moves (`rotate_row.gather_rows`)."""
    halves = [random.getrandbits(16) for _ in range(4)]
    (a0, a1, b0, b1) = halves
    after = carry_out(rotate_row._PAIR.value, {"$2": a0 | a1 << 16, "$3": b0 | b1 << 16})
    assert (after["$0"], after["$1"]) == (a0 | b0 << 16, a1 | b1 << 16)
