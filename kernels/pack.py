"""Packing of code points into bytes, and back. Exact bit moves, any device, traceable.

4-bit formats: two code points a byte, the even channel in the low nibble; this is the layout of
torchao's NVFP4Tensor and MXTensor (``pack_uint4``). 8-bit formats: the byte itself. 3 bits, planes
in each row: first K/4 bytes of magnitudes (channel 4i+j at bits 2j and 2j+1 of byte i), then K/8
bytes of signs (channel 8i+j at bit j of byte i), so 3 bits an element without straddling a byte. int3f has
its two lower bits in the place of magnitudes, its highest in that of signs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pq_fx.errors import FormatError
from pq_fx.kernels.formats import Format


def _merge(fields: Tensor, width: int) -> Tensor:
    """Join uint8 fields of `width` bits [..., n * 8/width] into bytes [..., n], lowest first."""
    per_byte = 8 // width
    parts = fields.unflatten(-1, (-1, per_byte)).unbind(-1)
    merged = parts[0]
    for i in range(1, per_byte):
        merged = merged | (parts[i] << (width * i))
    return merged


def _split(packed: Tensor, width: int) -> Tensor:
    """Cut bytes [..., n] into uint8 fields of `width` bits [..., n * 8/width], lowest first."""
    mask = (1 << width) - 1
    parts = [(packed >> (width * i)) & mask for i in range(8 // width)]
    return torch.stack(parts, dim=-1).flatten(-2)


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """Pack code points uint8 [..., K] into uint8 [..., K * bits / 8].

    Raises:
        FormatError: codes are not uint8, or K does not fill whole bytes (3 bits K % 8, 4 bits K % 2).
    """
    if codes.dtype != torch.uint8:
        raise FormatError(f"pack wants uint8 code points, got {codes.dtype}; call quantize first")
    channels = codes.shape[-1]
    _check_bytes(channels, fmt)
    if fmt.bits == 8:
        return codes.contiguous()
    if fmt.bits == 4:
        return _merge(codes & 15, 4)
    return torch.cat([_merge(codes & 3, 2), _merge((codes >> 2) & 1, 1)], dim=-1)


def unpack(packed: Tensor, fmt: Format, channels: int) -> Tensor:
    """Inverse of `pack`: uint8 [..., K * bits / 8] to code points uint8 [..., K], K = `channels`.

    Raises:
        FormatError: packed is not uint8 or its last axis does not hold K elements.
    """
    if packed.dtype != torch.uint8:
        raise FormatError(f"unpack wants uint8 bytes, got {packed.dtype}")
    _check_bytes(channels, fmt)
    if packed.shape[-1] != fmt.packed_bytes(channels):
        raise FormatError(
            f"{channels} channels of {fmt.key} take {fmt.packed_bytes(channels)} bytes a row, "
            f"found {packed.shape[-1]}; was it packed in another format?"
        )
    if fmt.bits == 8:
        return packed
    if fmt.bits == 4:
        return _split(packed, 4)
    magnitude, sign = packed.split([channels // 4, channels // 8], dim=-1)
    return _split(magnitude, 2) | (_split(sign, 1) << 2)


def channels_of(packed: Tensor, fmt: Format) -> int:
    """Number of channels K that packed rows [..., K * bits / 8] hold."""
    return packed.shape[-1] * 8 // fmt.bits


def _check_bytes(channels: int, fmt: Format) -> None:
    unit = {3: 8, 4: 2, 8: 1}[fmt.bits]
    if channels % unit:
        raise FormatError(
            f"K={channels} channels of {fmt.name} do not fill whole bytes; "
            f"K must be a multiple of {unit}"
        )
