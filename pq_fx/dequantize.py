"""Back to float: a quantized model with ordinary linears of the values that its codes stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pq_fx import applied, seen
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import unpack
from pq_fx.kernels.reference import Quantized, rotate
from pq_fx.kernels.reference import dequantize as values
from pq_fx.modules import QuantLinear, quantized_linears
from pq_fx.places import Places
from pq_fx.pointwise import restore


def float_weight(linear: QuantLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out_features, in_features] that `linear` computes with, in its input's own order, unrotated."""
    fmt = Format.parse(linear.weight_format)
    codes = unpack(linear.weight, fmt, linear.in_features)
    weight = values(Quantized(codes, linear.weight_scale, linear.weight_global_scale), fmt)
    quantizer = linear.input_quantizer
    if quantizer is not None:
        weight = rotate(weight, quantizer.rotation)  # the normalised Hadamard is its own inverse
        if quantizer.perm is not None:
            weight = torch.empty_like(weight).index_copy_(1, quantizer.perm.long(), weight)
        if quantizer.smooth is not None:
            weight = weight * quantizer.smooth
    if linear.low_rank_up is not None and linear.low_rank_down is not None:
        weight = weight + linear.low_rank_up.float() @ linear.low_rank_down.float()
    return weight.to(dtype)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace each quantized linear of `model` by an `nn.Linear`, in place and one at a time.

    The weights keep the error of their quantization; activations are not quantized any more. Permutations and smoothing
    that were folded are undone, so that every tensor is the float model's but for that error.

    Args:
        model: a converted or loaded model.
        dtype: of the new weights; by default that of the linear's bias, else of the model's float parameters.

    Returns:
        `model`.
    """
    inner = getattr(model, "_orig_mod", model)
    linears = quantized_linears(inner)
    inside = {id(p) for linear in linears.values() for p in linear.parameters()}
    own = [p.dtype for p in inner.parameters() if p.is_floating_point() and id(p) not in inside]
    default = (own or [torch.get_default_dtype()])[0]
    places = Places(inner)
    places.check(linears.values())
    for linear in linears.values():
        places.put(linear, _float_linear(linear, dtype, default))
    applied.undo(inner)
    seen.detach(inner)
    restore(inner)
    return model


def _float_linear(
    linear: QuantLinear, dtype: torch.dtype | None, default: torch.dtype
) -> nn.Linear:
    bias = linear.bias
    kind = dtype or (default if bias is None else bias.dtype)
    sizes = linear.in_features, linear.out_features
    made = nn.Linear(*sizes, bias is not None, device="meta", dtype=kind)
    made.weight = nn.Parameter(float_weight(linear, kind), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(kind), requires_grad=False)
    return made.eval()
