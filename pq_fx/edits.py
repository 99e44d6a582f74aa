"""What a conversion does to the float tensors that stay, and to weights before they are packed.

Axes are scaled and biases shifted first (smoothing), in the model's own order, and then reordered (folds). Nothing is
copied until a tensor is asked for, so a conversion holds one edited tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Axis = tuple[str, int]


@dataclass(frozen=True)
class AxisEdit:
    """One axis: times `factor` plus `offset` (fp32 [n]), then read in `order` (integers [n]); None: not.

    Only biases have an offset. `center` (fp32 [n], columns of a weight, in the float model's order) changes no value:
    it is what was taken off the linear's input, whose share of the output is in the bias.
    """

    factor: Tensor | None
    order: Tensor | None
    offset: Tensor | None = None
    center: Tensor | None = None

    def apply(self, value: Tensor, axis: int) -> Tensor:
        """`value` of the float model as the converted one needs it, in its own dtype."""
        if self.factor is not None or self.offset is not None:
            wide = value.float()
            if self.factor is not None:
                wide = wide * _along(self.factor, value, axis)
            if self.offset is not None:
                wide = wide + _along(self.offset, value, axis)
            value = wide.to(value.dtype)
        if self.order is not None:
            value = value.index_select(axis, self.order.to(value.device))
        return value

    def undo(self, value: Tensor, axis: int) -> Tensor:
        """The inverse of `apply`."""
        if self.order is not None:
            value = torch.empty_like(value).index_copy_(
                axis, self.order.to(value.device).long(), value
            )
        if self.factor is not None or self.offset is not None:
            wide = value.float()
            if self.offset is not None:
                wide = wide - _along(self.offset, value, axis)
            if self.factor is not None:
                wide = wide / _along(self.factor, value, axis)
            value = wide.to(value.dtype)
        return value


def _along(factor: Tensor, value: Tensor, axis: int) -> Tensor:
    shape = [-1 if i == axis else 1 for i in range(value.dim())]
    return factor.to(value.device).view(shape)


class Edits:
    """Edits by (parameter, axis) over a model's tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._factors: dict[Axis, Tensor] = {}
        self._offsets: dict[Axis, Tensor] = {}
        self._orders: dict[Axis, Tensor] = {}
        self._centers: dict[Axis, Tensor] = {}

    def scale(self, name: str, axis: int, factor: Tensor) -> None:
        """Multiply an axis, with what was added to it, by factor fp32 [size]; factors multiply up."""
        for values in (self._factors, self._offsets):
            if (name, axis) in values:
                values[name, axis] = values[name, axis] * factor
        self._factors.setdefault((name, axis), factor)

    def shift(self, name: str, offset: Tensor) -> None:
        """Add offset fp32 [size] to a bias; offsets add up."""
        known = self._offsets.get((name, 0))
        self._offsets[name, 0] = offset if known is None else known + offset

    def center(self, weight: str, bias: str, center: Tensor) -> None:
        """The linear's input comes without `center` (fp32 [in_features]): its bias adds what that gave.

        In units of the input before a scale of the weight's columns, which has to follow.
        """
        self._centers[weight, 1] = center
        self.shift(bias, self.scaled(weight).float() @ center)

    def reorder(self, name: str, axis: int, order: Tensor) -> None:
        """Read an axis in another order, int64 [size]; a second order is of the reordered axis."""
        # Two regions may hold different positions of one axis (rows of a fused projection).
        known = self._orders.get((name, axis))
        self._orders[name, axis] = order if known is None else known[order]

    def axes(self) -> Iterator[tuple[Axis, AxisEdit]]:
        """Each axis that changes, with its edit."""
        every = (self._factors, self._orders, self._offsets, self._centers)
        for axis in dict.fromkeys(axis for values in every for axis in values):
            yield axis, AxisEdit(*(values.get(axis) for values in every))

    def names(self) -> Iterator[str]:
        """Tensors that change."""
        every = (*self._factors, *self._offsets, *self._orders)
        yield from dict.fromkeys(name for name, _ in every)

    def scaled(self, name: str) -> Tensor:
        """The tensor scaled and shifted, in the model's order; the tensor itself where it is not."""
        tensor = self.tensors[name].detach()
        for axis in range(tensor.dim()):
            found = self._factors.get((name, axis)), None, self._offsets.get((name, axis))
            tensor = AxisEdit(*found).apply(tensor, axis)
        return tensor

    def edited(self, name: str) -> Tensor:
        """The tensor scaled, shifted and in its new orders; the tensor itself where nothing changes."""
        tensor = self.scaled(name)
        for axis in range(tensor.dim()):
            tensor = AxisEdit(None, self._orders.get((name, axis))).apply(tensor, axis)
        return tensor

    @torch.no_grad()
    def commit(self, model: nn.Module, keep: set[str]) -> None:
        """Put new tensors where `model` holds changed ones, under every name; `keep` names those that are packed.

        The old tensors stay as they are: another model may share them. All new ones are made before the first is put,
        so running out of memory changes nothing.
        """
        new = {
            id(self.tensors[name]): self.edited(name) for name in self.names() if name not in keep
        }
        parameters: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for leaf, old in module._parameters.items():
                if id(old) in new and old is not None:
                    value = nn.Parameter(new[id(old)], requires_grad=old.requires_grad)
                    module._parameters[leaf] = parameters.setdefault(id(old), value)
            for leaf, buffer in module._buffers.items():
                if id(buffer) in new:
                    module._buffers[leaf] = new[id(buffer)]
