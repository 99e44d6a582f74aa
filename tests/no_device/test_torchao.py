"""nvfp4 and mxfp4 are bit-exact with torchao's NVFP4Tensor and MXTensor: codes, scales, values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pq_fx.kernels.formats import get_format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import dequantize, nvfp4_global_scale, quantize

pytest.importorskip("torchao")
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

DTYPES = (torch.float32, torch.bfloat16)
SIZES = (1e-30, 1e-3, 1.0, 1e4, 1e30)


def rows(dtype: torch.dtype, size: float) -> Tensor:
    """Odd row count, groups of very unlike magnitude, zeros of both signs."""
    x = torch.randn(33, 352) * torch.rand(33, 352) ** 4 * size
    x[0] = 0.0
    x[1, ::3] = -0.0
    x[2, 16:32] *= 1e-6
    return x.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4(dtype: torch.dtype, size: float) -> None:
    x = rows(dtype, size)
    fmt = get_format("nvfp4")
    # The floor of pq_fx's own global scale differs for tensors below 2^-100, so take torchao's.
    tensor_scale = per_tensor_amax_to_scale(x.abs().amax())
    if size >= 1e-20:
        assert torch.equal(tensor_scale, nvfp4_global_scale(x.abs().amax()))
    for global_scale in (None, tensor_scale, tensor_scale * 0.3):
        theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=global_scale)
        ours = quantize(x, fmt, global_scale=global_scale)
        assert same_bits(theirs.qdata, pack(ours.codes, fmt))
        assert same_bits(theirs.scale, ours.scale)
        assert same_bits(theirs.dequantize(torch.float32), dequantize(ours, fmt))


@pytest.mark.parametrize("size", (1e-38, *SIZES))  # the first lets every exponent underflow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4(dtype: torch.dtype, size: float) -> None:
    x = rows(dtype, size)
    fmt = get_format("mxfp4")
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32)
    ours = quantize(x, fmt)
    assert same_bits(theirs.qdata, pack(ours.codes, fmt))
    assert same_bits(theirs.scale, ours.scale)
    assert same_bits(theirs.dequantize(torch.float32), dequantize(ours, fmt))


def test_the_two_formats_are_not_each_other() -> None:
    x = rows(torch.float32, 1.0)
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32)
    assert not same_bits(
        theirs.qdata, pack(quantize(x, get_format("nvfp4")).codes, get_format("nvfp4"))
    )
