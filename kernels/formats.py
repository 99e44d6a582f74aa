"""Number formats: element type, group size and scale type of a quantized weight or activation.

A format is named by one string, its key, e.g. ``"int4:64:bf16"``; ops, checkpoints and reports
carry that string. Code points (one ``uint8`` an element before packing):

=======  ====================================================  =========
name     code point                                            max_value
=======  ====================================================  =========
int4     sign-magnitude nibble: bit 3 sign, bits 0-2 0..7      7
int3     sign-magnitude: bit 2 sign, bits 0-1 0..3             3
int4f    offset binary nibble: value + 8, -8..7                8
int3f    offset binary: value + 4, -4..3                       4
nvfp4    e2m1 nibble of OCP MX v1.0 section 5.3.3              6
mxfp4    e2m1 nibble                                           6
fp8      e4m3fn byte                                           448
int8     two's complement byte, -127..127                      127
=======  ====================================================  =========

"4over6" scales of nvfp4 are stored and read as "e4m3" ones; how a group gets its scale differs: by amax / 6 or
amax / 4, whichever has less squared error (Cook et al., "Four Over Six", arXiv 2512.02010).

int4f and int3f ("full range") use every code point. Their scales have a sign: it turns each group so that
its largest element comes to lie on -8 (-4), the end that has no counterpart. So does Q4_0 of GGUF (ggml,
`quantize_row_q4_0_ref` in ggml-quants.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from pq_fx.errors import FormatError

INTEGER_GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class _Element:
    """What is the same for every format of one name."""

    element: str
    bits: int
    max_value: float
    groups: tuple[int, ...]
    scales: tuple[str, ...]
    operand_gain: int  # power of two: the largest element times this still fits e4m3's 448


# The first group and the first scale of each row are the defaults of get_format.
_ELEMENTS: dict[str, _Element] = {
    "int4": _Element("int4", 4, 7.0, (64, 16, 32, 128), ("bf16", "pow2"), 64),
    "int3": _Element("int3", 3, 3.0, (64, 16, 32, 128), ("bf16", "pow2"), 128),
    "int4f": _Element("int4f", 4, 8.0, (64, 16, 32, 128), ("bf16",), 32),
    "int3f": _Element("int3f", 3, 4.0, (64, 16, 32, 128), ("bf16",), 64),
    "nvfp4": _Element("e2m1", 4, 6.0, (16,), ("e4m3", "4over6"), 64),
    "mxfp4": _Element("e2m1", 4, 6.0, (32,), ("e8m0",), 64),
    "fp8": _Element("e4m3", 8, 448.0, (0, *INTEGER_GROUPS), ("fp32",), 1),
    "int8": _Element("int8", 8, 127.0, (0, *INTEGER_GROUPS), ("fp32",), 2),
}
FORMAT_NAMES: tuple[str, ...] = tuple(_ELEMENTS)

# Bits that one stored scale takes. pow2 scales are stored as bf16 (exact), e8m0 as its uint8 byte.
_SCALE_BITS = {"bf16": 16, "pow2": 16, "e4m3": 8, "4over6": 8, "e8m0": 8, "fp32": 32}

_SCALE_DTYPES = {
    "bf16": torch.bfloat16,
    "pow2": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "4over6": torch.float8_e4m3fn,
    "e8m0": torch.uint8,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: "int4", "int3", "int4f", "int3f", "nvfp4", "mxfp4", "fp8" or "int8".
        group_size: contiguous channels that share a scale; 0 = one scale a row (fp8 and int8 only).
        scale: "bf16" or "pow2" (int4, int3), "bf16" (int4f, int3f), "e4m3" or "4over6" (nvfp4), "e8m0" (mxfp4),
            "fp32" (fp8, int8).

    Raises:
        FormatError: the three do not name a known format.
    """

    name: str
    group_size: int
    scale: str

    def __post_init__(self) -> None:
        known = _ELEMENTS.get(self.name)
        if known is None:
            raise FormatError(f"unknown format {self.name!r}; known: {', '.join(FORMAT_NAMES)}")
        if self.group_size not in known.groups:
            raise FormatError(
                f"{self.name} has no group size {self.group_size}; "
                f"known: {', '.join(map(str, sorted(known.groups)))}"
                + (" (0 = one scale a row)" if 0 in known.groups else "")
            )
        if self.scale not in known.scales:
            raise FormatError(
                f"{self.name} has no scale type {self.scale!r}; known: {', '.join(known.scales)}"
            )

    @property
    def key(self) -> str:
        """The string that ops, checkpoints and reports carry, e.g. ``"int4:64:bf16"``."""
        return f"{self.name}:{self.group_size}:{self.scale}"

    @classmethod
    def parse(cls, key: str) -> Format:
        """Read a key back (the inverse of `key`); raises FormatError when it is not one."""
        return _parse(key)

    @property
    def element(self) -> str:
        """Element type: "int4", "int3", "int4f", "int3f", "e2m1", "e4m3" or "int8"."""
        return _ELEMENTS[self.name].element

    @property
    def bits(self) -> int:
        """Bits of one packed element."""
        return _ELEMENTS[self.name].bits

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes that formats of this name may have."""
        return _ELEMENTS[self.name].groups

    @property
    def max_value(self) -> float:
        """Largest magnitude of an element before its scale."""
        return _ELEMENTS[self.name].max_value

    @property
    def full_range(self) -> bool:
        """Whether elements are -max_value to max_value - 1 and group scales have a sign (int4f, int3f)."""
        return self.element in ("int4f", "int3f")

    @property
    def operand_gain(self) -> int:
        """Power of two that lifts elements into e4m3's range in the "e4m3" carrier.

        ``max_value * operand_gain <= 448``, and it is a power of two so that relative power-of-two
        scales stay exact in e4m3 (see `pq_fx.kernels.reference.e4m3_operand`).
        """
        return _ELEMENTS[self.name].operand_gain

    @property
    def two_level(self) -> bool:
        """Whether a per-tensor fp32 global scale multiplies the group scales (nvfp4)."""
        return self.stored_scale == "e4m3"

    @property
    def stored_scale(self) -> str:
        """What a reader of stored scales sees: "e4m3" for "4over6", else `scale`."""
        return "e4m3" if self.scale == "4over6" else self.scale

    @property
    def scale_dtype(self) -> torch.dtype:
        """Storage dtype of the group scales."""
        return _SCALE_DTYPES[self.scale]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits an element, group scales included (one scale a row or tensor counts as 0)."""
        if self.group_size == 0:
            return float(self.bits)
        return self.bits + _SCALE_BITS[self.scale] / self.group_size

    def groups(self, channels: int) -> int:
        """Number of scales that a row of `channels` elements has."""
        return channels // self.group_size if self.group_size else 1

    def packed_bytes(self, channels: int) -> int:
        """Bytes that a packed row of `channels` elements takes."""
        return channels * self.bits // 8

    def check_channels(self, channels: int) -> None:
        """Raise FormatError unless rows of `channels` elements can be held in this format."""
        if self.group_size:
            if channels % self.group_size == 0:
                return
            fitting = [g for g in sorted(_ELEMENTS[self.name].groups) if g and channels % g == 0]
            way_out = (
                f"use a group_size out of {fitting}"
                if fitting
                else "use fp8 or int8 with one scale a row"
            )
            raise FormatError(
                f"K={channels} channels are not a multiple of the group of {self.group_size} of "
                f"{self.key}; {way_out}, or leave this layer in float by a rule"
            )


@lru_cache(maxsize=256)
def _parse(key: str) -> Format:
    parts = key.split(":")
    if len(parts) != 3 or not parts[1].isdecimal():
        raise FormatError(
            f"{key!r} is not a format key; expected name:group_size:scale, e.g. 'int4:64:bf16'"
        )
    return Format(parts[0], int(parts[1]), parts[2])


def get_format(name: str, group_size: int | None = None, scale: str | None = None) -> Format:
    """Format by name, with its defaults: integers g64 bf16, nvfp4 g16, mxfp4 g32, fp8/int8 a row.

    Raises:
        FormatError: unknown name, group size or scale type.
    """
    known = _ELEMENTS.get(name)
    if known is None:
        raise FormatError(f"unknown format {name!r}; known: {', '.join(FORMAT_NAMES)}")
    return Format(
        name,
        known.groups[0] if group_size is None else group_size,
        known.scales[0] if scale is None else scale,
    )
