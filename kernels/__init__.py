"""Number formats, packing, the reference and the ops of pq_fx (imported as ``pq_fx.kernels``).

Importing the package registers nothing and needs no Triton; `pq_fx.kernels.ops` registers the ops.
"""

from __future__ import annotations

from pq_fx.kernels.devices import Execution, execution
from pq_fx.kernels.formats import FORMAT_NAMES, Format, get_format
from pq_fx.kernels.pack import pack, unpack
from pq_fx.kernels.reference import (
    Quantized,
    dequantize,
    fake_quantize,
    permute_rotate,
    quantize,
    rotate,
)

__all__ = [
    "FORMAT_NAMES",
    "Execution",
    "Format",
    "Quantized",
    "dequantize",
    "execution",
    "fake_quantize",
    "get_format",
    "pack",
    "permute_rotate",
    "quantize",
    "rotate",
    "unpack",
]
