"""What a conversion does to the float tensors that stay, and to weights before they are packed.

Axes are scaled first (smoothing), in the model's own order, and then reordered (folds). Nothing is
copied until a tensor is asked for, so a conversion holds one edited tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

Axis = tuple[str, int]


class Edits:
    """Factors and orders by (parameter, axis) over a model's tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._factors: dict[Axis, Tensor] = {}
        self._orders: dict[Axis, Tensor] = {}

    def scale(self, name: str, axis: int, factor: Tensor) -> None:
        """Multiply an axis by factor fp32 [size]; factors multiply up."""
        known = self._factors.get((name, axis))
        self._factors[name, axis] = factor if known is None else known * factor

    def reorder(self, name: str, axis: int, order: Tensor) -> None:
        """Read an axis in another order, int64 [size]; a second order is of the reordered axis."""
        # Two regions may hold different positions of one axis (rows of a fused projection).
        known = self._orders.get((name, axis))
        self._orders[name, axis] = order if known is None else known[order]

    def axes(self) -> Iterator[tuple[Axis, Tensor | None, Tensor | None]]:
        """Each axis that changes, with its factor and its order."""
        for axis in dict.fromkeys((*self._factors, *self._orders)):
            yield axis, self._factors.get(axis), self._orders.get(axis)

    def names(self) -> Iterator[str]:
        """Tensors that change."""
        yield from dict.fromkeys(name for name, _ in (*self._factors, *self._orders))

    def scaled(self, name: str) -> Tensor:
        """The tensor with its factors, in the model's order; the tensor itself where it has none."""
        tensor = self.tensors[name].detach()
        for axis in range(tensor.dim()):
            factor = self._factors.get((name, axis))
            if factor is not None:
                shape = [-1 if i == axis else 1 for i in range(tensor.dim())]
                tensor = (tensor.float() * factor.view(shape)).to(tensor.dtype)
        return tensor

    def edited(self, name: str) -> Tensor:
        """The tensor with factors and orders; the tensor itself where it has none."""
        tensor = self.scaled(name)
        for axis in range(tensor.dim()):
            order = self._orders.get((name, axis))
            if order is not None:
                tensor = tensor.index_select(axis, order)
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
