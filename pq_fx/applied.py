"""What a conversion did to a model's axes, kept beside the model so that it can be told to others and undone.

Folding reorders channels and smoothing scales them, inside the weights; computing needs no record of it. What was made
for the float model does: a LoRA has to be put into the same order, and `dequantize` gives back the order of the float
model. The record is a table of small CPU tensors on the model; a checkpoint stores it under names of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pq_fx import packed_state
from pq_fx.edits import Axis, AxisEdit, Edits
from pq_fx.errors import CheckpointError
from pq_fx.modules import QuantLinear

PREFIX = "permuquant_edits."
_ATTRIBUTE = "permuquant_edits"
_KINDS = ("factor", "order", "offset", "center")


Applied = Mapping[Axis, AxisEdit]


def note(model: nn.Module, applied: Applied) -> None:
    """Leave the record on the model, whose state dicts go together with this record only."""
    setattr(model, _ATTRIBUTE, dict(applied))
    digest = hashlib.sha256()
    for name, value in sorted(to_tensors(applied).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    packed_state.guard(model, digest.hexdigest()[:16])


def of_model(model: nn.Module) -> Applied:
    """The record that was left on a model, by (parameter name, axis); empty if none was."""
    return getattr(model, _ATTRIBUTE, {})


def forget(model: nn.Module) -> None:
    """Take the record off a model."""
    model.__dict__.pop(_ATTRIBUTE, None)


def from_edits(model: nn.Module, edits: Edits) -> dict[Axis, AxisEdit]:
    """The record of a conversion that has just been committed.

    Where a linear's input is multiplied at run time by the inverse of what its columns were scaled with, the linear
    as a whole is not scaled, and no factor is recorded.
    """
    result = {}
    for (name, axis), edit in edits.axes():
        if edit.factor is not None and axis == 1 and _multiplies(model, name):
            edit = replace(edit, factor=None)
        if any(value is not None for value in _values(edit)):
            factor, order, offset, center = _values(edit)
            result[name, axis] = AxisEdit(
                None if factor is None else _stored(factor),
                None if order is None else order.to("cpu", torch.int32),
                None if offset is None else _stored(offset),
                None if center is None else _stored(center),
            )
    return result


def _values(edit: AxisEdit) -> tuple[Tensor | None, ...]:
    """In the order of `_KINDS`."""
    return tuple(getattr(edit, kind) for kind in _KINDS)


def _stored(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)


def _multiplies(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    quantizer = module.input_quantizer if isinstance(module, QuantLinear) else None
    return quantizer is not None and quantizer.smooth is not None


@torch.no_grad()
def undo(model: nn.Module) -> None:
    """Give a dequantized model the axes of the float model back, in place."""
    for (name, axis), edit in of_model(model).items():
        tensor = _find(model, name)
        tensor.data = edit.undo(tensor.data, axis)
    forget(model)


def _find(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name at conversion, when pointwise convolutions were linears."""
    parent, _, leaf = name.rpartition(".")
    try:
        return getattr(model.get_submodule(parent), leaf)
    except AttributeError:
        return getattr(model.get_submodule(parent.removesuffix(".linear")), leaf)


# In a checkpoint ---------------------------------------------------------------------------------


def is_record(name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the record and not to the model."""
    return name.startswith(PREFIX)


def to_tensors(applied: Applied) -> dict[str, Tensor]:
    """The record as tensors: ``permuquant_edits.order.1.blocks.0.to_q.weight``."""
    return {
        f"{PREFIX}{kind}.{axis}.{name}": value
        for (name, axis), edit in applied.items()
        for kind, value in zip(_KINDS, _values(edit), strict=True)
        if value is not None
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[Axis, AxisEdit]:
    """The inverse of `to_tensors`; other names are passed over.

    Raises:
        CheckpointError: a name or a value is none that `to_tensors` makes.
    """
    found: dict[Axis, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not is_record(key):
            continue
        kind, axis, name = [*key.removeprefix(PREFIX).split(".", 2), "", ""][:3]
        if kind not in _KINDS or not axis.isdecimal() or not name or not _good(kind, value):
            raise CheckpointError(
                f"{key} is no edit of an axis ({', '.join(_KINDS)}): the file is damaged"
            )
        found.setdefault((name, int(axis)), {})[kind] = value
    return {axis: AxisEdit(*(v.get(kind) for kind in _KINDS)) for axis, v in found.items()}


def check(applied: Applied, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError unless the record fits a float model whose tensors have these shapes."""
    for (name, axis), edit in applied.items():
        # Pointwise convolutions that stay in float were linears at conversion.
        parent, _, leaf = name.rpartition(".")
        shape = shapes.get(name) or shapes.get(f"{parent.removesuffix('.linear')}.{leaf}", ())
        sizes = {len(value) for value in _values(edit) if value is not None}
        if axis >= len(shape) or sizes != {shape[axis]}:
            raise CheckpointError(
                f"the record of folds has {max(sizes)} channels on axis {axis} of {name}, which the model has with "
                f"shape {list(shape)}: the file is damaged or belongs to another model"
            )


def _good(kind: str, value: Tensor) -> bool:
    if value.dim() != 1:
        return False
    if kind == "order":
        counted = torch.arange(len(value), dtype=torch.int32)
        return value.dtype == torch.int32 and torch.equal(value.sort().values, counted)
    good = value.isfinite() & (value != 0) if kind == "factor" else value.isfinite()
    return value.dtype == torch.float32 and bool(good.all())
