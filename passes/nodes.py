"""Reading a graph's nodes: shapes, fake tensors, and the operations that only pass a value on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Identity on values or on positions: casts, copies, and dropout that is off (diffusers leaves live dropout(0) nodes).
IDENTITY = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.detach_.default,
}  # fmt: skip
DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


def is_identity(node: fx.Node) -> bool:
    """True where the value is the first argument's, up to dtype, device or strides."""
    if node.op != "call_function":
        return False
    if node.target in IDENTITY:
        return True
    return node.target in DROPOUT and (node.args[1] == 0 or node.args[2] is False)


def source(node: fx.Node) -> fx.Node:
    """Follow identity operations up to the node that made the value."""
    while is_identity(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's tensor value; sizes may be SymInts."""
    return tuple(node.meta["val"].shape)


def tensor_meta(argument: fx.Node) -> torch.Tensor | None:
    """A node's fake tensor; a placeholder of Dynamo's keeps it under `val` after retracing."""
    value = argument.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def is_static(size: Any) -> bool:
    """Whether a size is a plain number, not a symbol."""
    return isinstance(size, int)


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1."""
    return is_static(size) and size == 1
