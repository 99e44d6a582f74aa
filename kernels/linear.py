"""Linears of quantized activations and packed weights on CUDA: which GEMM runs what.

The carrier, told by data's dtype, and the formats decide: "e4m3" `gemm_fp8`; "int8" `gemm_int8`;
"e2m1" with weights of the same format `gemm_e2m1`; everything else `gemm_codes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pq_fx.kernels.carriers import carrier_of
from pq_fx.kernels.decode import Packed
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_codes import dequantizing_gemm
from pq_fx.kernels.gemm_e2m1 import e2m1_gemm, takes_e2m1
from pq_fx.kernels.gemm_fp8 import fp8_linears
from pq_fx.kernels.gemm_int8 import int8_gemm, takes_int8
from pq_fx.kernels.rows import require


def linear(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    weight_format: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``x @ W^T + bias`` of quantized activations; arguments as `reference_ops.linear`.

    Raises:
        KernelError, FormatError: shapes, dtypes or formats do not fit.
        UnsupportedDeviceError: e4m3 data on a GPU without fp8 tensor cores.
    """
    return linears(
        data,
        scale,
        global_scale,
        format,
        [weight],
        [weight_scale],
        [weight_global_scale],
        weight_format,
        [bias],
        dtype,
    )


def linears(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    weight_global_scales: Sequence[Tensor | None],
    weight_format: str,
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """Linears of one quantized input, joined; arguments and errors as `linear`, [..., sum N_i].

    e4m3 data: the weights are decoded into one operand for one GEMM. Others: one GEMM each.
    """
    carrier = carrier_of(data)
    fmt, weight_fmt = Format.parse(format), Format.parse(weight_format)
    parts = [
        Packed(*part)
        for part in zip(weights, weight_scales, weight_global_scales, biases, strict=True)
    ]
    for part in parts:
        require(
            part.bias is None
            or (part.bias.shape == part.weight.shape[:1] and part.bias.device == data.device),
            f"bias must have shape ({part.weight.shape[0]},) on {data.device}",
        )
    lead = data.shape[:-1]
    rows = data.view(torch.uint8) if carrier == "e2m1" else data
    rows = rows.reshape(-1, rows.shape[-1])
    if carrier == "e4m3":
        out = fp8_linears(rows, scale, parts, weight_fmt, dtype)
        return out.view(*lead, out.shape[-1])
    scales = scale.reshape(rows.shape[0], scale.shape[-1])
    outs = []
    for weight, weight_scale, weight_global, bias in parts:
        packed = (weight, weight_scale)
        if carrier == "int8" and takes_int8(fmt, weight_fmt):
            out = int8_gemm(rows, scales, fmt, *packed, weight_fmt, bias, dtype)
        elif carrier == "e2m1" and takes_e2m1(data.device, fmt, weight_fmt):
            out = e2m1_gemm(
                rows, scales, global_scale, *packed, weight_global, weight_fmt, bias, dtype
            )
        else:
            out = dequantizing_gemm(
                rows, scales, global_scale, fmt, *packed, weight_global, weight_fmt, bias, dtype
            )
        outs.append(out)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    return out.view(*lead, out.shape[-1])
