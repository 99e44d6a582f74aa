"""Convolutions with a kernel of 1 as what they are, linears over channels, while a model is quantized.

    before   conv   Conv2d(K, N, 1)                y = conv(x)                              x [B, K, H, W]
    after    conv   PointwiseConv                  y = conv.linear(x.movedim(1, -1)).movedim(-1, 1)
                    .linear  Linear(K, N)

More than half of SANA's block GEMMs are such convolutions. As linears they go the way of all linears: one set of
passes, of packed modules and of kernels. The linear shares its weight's memory with the convolution. What is not
quantized in the end is a convolution again, so that a float layer keeps its name and its class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pq_fx.hooks import carry_hooks
from pq_fx.places import Places

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PointwiseConv(nn.Module):
    """`linear` over axis 1 of x [B, K, ...] -> [B, N, ...]; `kind` is the convolution class it stands for."""

    def __init__(self, linear: nn.Module, kind: type[nn.Module]) -> None:
        super().__init__()
        self.linear = linear
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """x [B, K, ...] -> [B, N, ...]."""
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"a {self.kind.__name__} with a kernel of 1"


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that mixes nothing but channels."""
    return (
        type(module) in CONVOLUTIONS
        and module.groups == 1
        and all(n == 1 for n in (*module.kernel_size, *module.stride))  # type: ignore[misc]
        and module.padding in ("valid", "same", (0,) * len(module.kernel_size))  # type: ignore[arg-type]
    )


def linearize(model: nn.Module, only: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Replace pointwise convolutions (those named in `only`, else all) by linears, in place, wherever they are held.

    Returns the convolutions by (first) name. Raises CalibrationError, the model being unchanged, where one is held in a
    way that cannot be changed.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if is_pointwise(module) and (only is None or name in only)
    }
    places = Places(model)
    places.check(found.values())
    for conv in found.values():
        made = PointwiseConv(_linear(conv), type(conv))
        carry_hooks(conv, made)
        places.put(conv, made)
    return found


def restore(model: nn.Module) -> None:
    """Make convolutions of the pointwise linears that are in float, in place (after `dequantize`)."""
    places = Places(model)
    for module in [*model.modules()]:
        if isinstance(module, PointwiseConv) and type(module.linear) is nn.Linear:
            made = _convolution(module.linear, module.kind)
            carry_hooks(module, made)
            places.put(module, made)


@contextmanager
def linearized(model: nn.Module, only: Collection[str] | None = None) -> Iterator[None]:
    """Inside, pointwise convolutions are linears; afterwards those that were not quantized are as they were."""
    found = linearize(model, only)
    try:
        yield
    finally:
        places = Places(model)
        for name, conv in found.items():
            stand_in = model.get_submodule(name)
            if type(stand_in.linear) is nn.Linear:
                _take_back(conv, stand_in.linear)
                places.put(stand_in, conv)


def _take_back(conv: nn.Module, linear: nn.Linear) -> None:
    """A fold or a move may have given the linear other tensors than those that it shared with the convolution."""
    weight = conv.weight
    assert isinstance(weight, Tensor)
    if linear.weight.data_ptr() != weight.data_ptr():
        value = linear.weight.data.view(weight.shape)
        conv.weight = nn.Parameter(value, requires_grad=weight.requires_grad)
    conv.bias = linear.bias


def _linear(conv: nn.Module) -> nn.Linear:
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, Tensor)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    matrix = weight.data.view(weight.shape[:2])
    linear.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = bias  # type: ignore[assignment]
    return linear.train(conv.training)


def _convolution(linear: nn.Linear, kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        conv = kind(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    weight = linear.weight.data.view(conv.weight.shape)  # type: ignore[arg-type]
    conv.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        conv.bias = linear.bias
    return conv.train(linear.training)
