"""Carriers: the forms in which quantized activations reach a GEMM; data's dtype tells which one it is.

=======  =============================================  ===============================  ============
carrier  data                                           scale                            elements
=======  =============================================  ===============================  ============
codes    uint8 code points [..., K]                     stored, [..., K / g]             all
int8     int8 lattice points [..., K], e2m1's doubled   stored, [..., K / g]             all but fp8
                                                                                 and groups of 16
e2m1     float4_e2m1fn_x2 [..., K / 2], as weights are  stored, [..., K / g]             nvfp4, mxfp4
         packed: the even channel in the low nibble
e4m3     float8_e4m3fn [..., K], group scales inside    fp32, one a row [..., 1]         all but int8
=======  =============================================  ===============================  ============

"codes", "int8" and "e2m1" are exact; "e4m3" rounds element times relative scale (`values.fold_scale`).
Which one a device takes is in `pq_fx.kernels.devices`. On a CPU each is defined for every format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pq_fx.errors import ConfigError, FormatError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack, unpack
from pq_fx.kernels.reference import Quantized, e4m3_operand
from pq_fx.kernels.values import element_values

_DTYPES = {
    "codes": torch.uint8,
    "int8": torch.int8,
    "e2m1": torch.float4_e2m1fn_x2,
    "e4m3": torch.float8_e4m3fn,
}
CARRIERS = tuple(_DTYPES)


def check_carrier(carrier: str, fmt: Format) -> None:
    """Raise ConfigError for an unknown carrier, FormatError where it cannot hold the format exactly."""
    if carrier not in _DTYPES:
        raise ConfigError(f"unknown carrier {carrier!r}; known: {', '.join(CARRIERS)}")
    if not carries(carrier, fmt):
        raise FormatError(
            f"the carrier {carrier!r} cannot hold {fmt.key}; use 'codes', or what "
            "pq_fx.kernels.devices.carrier gives for the device"
        )


def carries(carrier: str, fmt: Format) -> bool:
    """Whether a carrier holds a format's elements without another rounding ("e4m3": of any kind)."""
    if carrier == "int8":  # int8 tensor cores take 32 channels at a time
        return fmt.element != "e4m3" and fmt.group_size != 16
    return carrier != "e2m1" or fmt.element == "e2m1"


def int8_unit(fmt: Format) -> int:
    """Lattice points an element of 1 takes in the "int8" carrier: e2m1 counts in halves."""
    return 2 if fmt.element == "e2m1" else 1


def data_dtype(carrier: str) -> torch.dtype:
    """The dtype of a carrier's data."""
    return _DTYPES[carrier]


def data_width(carrier: str, channels: int) -> int:
    """Entries of a carrier's data along a row of `channels`."""
    return channels // 2 if carrier == "e2m1" else channels


def carrier_of(data: Tensor) -> str:
    """The carrier that quantized data is in; raises FormatError for a dtype that belongs to none."""
    for carrier, dtype in _DTYPES.items():
        if data.dtype == dtype:
            return carrier
    raise FormatError(
        f"data of dtype {data.dtype} belongs to no carrier; expected "
        f"{', '.join(str(d) for d in _DTYPES.values())}, as pq::quantize returns them"
    )


def channels_carried(data: Tensor) -> int:
    """Channels K of data, whatever its carrier."""
    return data.shape[-1] * (2 if data.dtype == torch.float4_e2m1fn_x2 else 1)


def carry(q: Quantized, fmt: Format, carrier: str) -> tuple[Tensor, Tensor]:
    """(data, scale) of a quantized tensor in a carrier; the definition of what kernels store."""
    if carrier == "e4m3":
        return e4m3_operand(q, fmt)
    if carrier == "int8":
        return (element_values(q.codes, fmt) * int8_unit(fmt)).to(torch.int8), q.scale
    if carrier == "e2m1":
        return pack(q.codes, fmt).view(torch.float4_e2m1fn_x2), q.scale
    return q.codes, q.scale


def carried_values(data: Tensor, fmt: Format) -> Tensor:
    """fp32 element values [..., K] of data in an exact carrier, before their scale."""
    if data.dtype == torch.int8:
        return data.float() * (1.0 / int8_unit(fmt))
    if data.dtype == torch.float4_e2m1fn_x2:
        data = unpack(data.view(torch.uint8), fmt, channels_carried(data))
    return element_values(data, fmt)
