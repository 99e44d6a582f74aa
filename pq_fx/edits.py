"""What a conversion does to the float tensors that stay, and to weights before they are packed.

Axes are scaled and biases shifted first (smoothing), in the model's own order, and then reordered (folds). Nothing is
copied until a tensor is asked for, so a conversion holds one edited tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pq_fx.passes.turned import Matrix

Axis = tuple[str, int]
# Elements that are edited at once: their fp32 copies are small beside a layer.
_ELEMENTS = 1 << 21


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

    @property
    def changes(self) -> bool:
        """Whether any value changes or moves."""
        return any(v is not None for v in (self.factor, self.order, self.offset))

    def to(self, device: torch.device) -> AxisEdit:
        """The same, on a device."""
        values = (self.factor, self.order, self.offset, self.center)
        return AxisEdit(*(None if v is None else v.to(device) for v in values))

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


def _taken(edit: AxisEdit, part: slice | Tensor) -> tuple[slice | Tensor, AxisEdit]:
    """Where positions `part` (a slice, or integers [n]) of an edited axis are read from, and the edit of these."""
    where = part if edit.order is None else edit.order[part]

    def of(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[where]

    return where, AxisEdit(of(edit.factor), None, of(edit.offset))


def _along(factor: Tensor, value: Tensor, axis: int) -> Tensor:
    shape = [-1 if i == axis else 1 for i in range(value.dim())]
    return factor.to(value.device).view(shape)


class Edits:
    """Edits by (parameter, axis) over a model's tensors, on the CPU: those of all axes are as large as a layer."""

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
                values[name, axis] = values[name, axis] * factor.cpu()
        self._factors.setdefault((name, axis), factor.cpu())

    def shift(self, name: str, offset: Tensor) -> None:
        """Add offset fp32 [size] to a bias; offsets add up."""
        known = self._offsets.get((name, 0))
        self._offsets[name, 0] = offset.cpu() if known is None else known + offset.cpu()

    def center(self, weight: str, bias: str, center: Tensor) -> None:
        """The linear's input comes without `center` (fp32 [in_features]): its bias adds what that gave.

        In units of the input before a scale of the weight's columns, which has to follow.
        """
        self._centers[weight, 1] = center.cpu()
        rows = self.rows(weight, ordered=False)
        parts = rows.parts()
        self.shift(bias, torch.cat([rows[p].float() @ center.to(rows.device) for p in parts]))

    def reorder(self, name: str, axis: int, order: Tensor) -> None:
        """Read an axis in another order, int64 [size]; a second order is of the reordered axis."""
        # Two regions may hold different positions of one axis (rows of a fused projection).
        known, order = self._orders.get((name, axis)), order.cpu()
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
        return self._made(name, ordered=False)

    def edited(self, name: str) -> Tensor:
        """The tensor scaled, shifted and in its new orders; the tensor itself where nothing changes."""
        return self._made(name, ordered=True)

    def rows(self, name: str, *, ordered: bool = True) -> EditedRows:
        """The rows of `edited`, or of `scaled`, made when they are asked for."""
        tensor = self.tensors[name].detach()
        axes = self._axes(name, tensor.dim(), ordered=ordered)
        return EditedRows(tensor, [edit.to(tensor.device) for edit in axes])

    def _axes(self, name: str, dims: int, *, ordered: bool) -> list[AxisEdit]:
        return [
            AxisEdit(
                self._factors.get((name, axis)),
                self._orders.get((name, axis)) if ordered else None,
                self._offsets.get((name, axis)),
            )
            for axis in range(dims)
        ]

    def _made(self, name: str, *, ordered: bool) -> Tensor:
        rows = self.rows(name, ordered=ordered)
        if not rows.changes:
            return rows.tensor
        made = torch.empty(rows.shape, dtype=rows.tensor.dtype, device=rows.device)
        for part in rows.parts():
            made[part] = rows[part]
        return made

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


class EditedRows:
    """A tensor [N, ...] of which `[start:stop]` gives edited rows: a whole copy of a large one never exists.

    `axes` are its edits, on its device.
    """

    def __init__(self, tensor: Tensor, axes: list[AxisEdit]) -> None:
        self.tensor, self._axes = tensor, axes
        self.shape, self.device = tensor.shape, tensor.device

    @property
    def changes(self) -> bool:
        """Whether any value changes or moves."""
        return any(edit.changes for edit in self._axes)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, part: slice) -> Tensor:
        if not self.changes:
            return self.tensor[part]
        first, *others = self._axes
        rows, edit = _taken(first, part)
        value = edit.apply(self.tensor[rows], 0)
        for axis, edit in enumerate(others, 1):
            value = edit.apply(value, axis)
        return value

    def parts(self) -> Iterator[slice]:
        """All rows, some at a time."""
        step = max(1, _ELEMENTS // max(1, self.tensor[:1].numel()))
        return (slice(start, start + step) for start in range(0, len(self), step))

    def columns(self, part: slice, index: Tensor) -> Tensor:
        """Columns `index` (int64 [b]) of rows `part`: [n, b]."""
        rows, first = _taken(self._axes[0], part)
        columns, second = _taken(self._axes[1], index)
        where = rows if isinstance(rows, slice) else rows[:, None]
        value = self.tensor[rows][:, columns] if where is rows else self.tensor[where, columns]
        return second.apply(first.apply(value, 0), 1)


class Scaled(Mapping[str, Matrix]):
    """The scaled tensors of `names`; rows of those that change are made when they are asked for, and not kept."""

    def __init__(self, edits: Edits, names: Iterable[str]) -> None:
        self._edits, self._names = edits, tuple(names)

    def __getitem__(self, name: str) -> Matrix:
        if name not in self._names:
            raise KeyError(name)
        rows = self._edits.rows(name, ordered=False)
        return rows if rows.changes else rows.tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
