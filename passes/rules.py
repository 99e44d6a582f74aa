"""What each ATen operation does to channels: one rule a family of operations, in one table.

A rule gets the propagation state and the node and returns the labels of the node's value (channels.py says what
labels are). Its duty is soundness: whatever it cannot prove equivariant, it tells apart or pins. An operation that
is not in the table and is not elementwise pins all its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from pq_fx.passes.channels import Labels, Propagation, read
from pq_fx.passes.layout import expand_rule, reshape_labels, squeeze_to

aten = torch.ops.aten
Rule = Callable[[Propagation, fx.Node], Any]
RULES: dict[Any, Rule] = {}

# Identity on values or on positions: casts, copies, and dropout that is off (diffusers leaves live dropout(0) nodes).
IDENTITY = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.detach_.default,
}  # fmt: skip
DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
# Operations that yield nothing and change nothing.
CHECKS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range_for_size",
    "observe",
}


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


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Enter a function into the table for these operations."""

    def enter(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return enter


def apply_rule(state: Propagation, node: fx.Node) -> Any:
    """The labels of a call_function node's value."""
    target = node.target
    if is_identity(node):
        return value_of(state, node.args[0])
    if target in RULES:
        return RULES[target](state, node)
    schema = getattr(target, "_schema", None)
    if schema is not None and schema.name.split("::")[-1] in CHECKS:
        return None
    if schema is not None and schema.is_mutable:
        return _pin_inputs(state, node, f"{node.name} ({target}) writes in place")
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return pointwise(state, node)
    return _pin_inputs(state, node, f"no rule for {target} ({node.name})")


def value_of(state: Propagation, argument: Any) -> Labels | None:
    """The labels of an argument that should be one tensor; None where it carries no channels."""
    if not isinstance(argument, fx.Node):
        return None
    labels = read(state, argument)
    return labels if isinstance(labels, np.ndarray) else None


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's tensor value; sizes may be SymInts."""
    return tuple(node.meta["val"].shape)


def _pin_inputs(state: Propagation, node: fx.Node, reason: str) -> Labels | None:
    """Pin all inputs; the value carries no channels, which is what a rule then returns."""
    for argument in node.all_input_nodes:
        labels = read(state, argument)
        for item in labels if isinstance(labels, (list, tuple)) else [labels]:
            state.pin(item, reason)
    return None


def _static(size: Any) -> bool:
    return isinstance(size, int)


def tensor_meta(argument: fx.Node) -> torch.Tensor | None:
    """A node's fake tensor; a placeholder of Dynamo's keeps it under `val` after retracing."""
    value = argument.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def pointwise(state: Propagation, node: fx.Node) -> Labels | None:
    """Equate operands coordinate by coordinate; see `_join` for broadcasting."""
    operands = [a for a in node.all_input_nodes if tensor_meta(a) is not None]
    return join(state, node, [(value_of(state, a), tuple(tensor_meta(a).shape)) for a in operands])  # type: ignore[union-attr]


def join(
    state: Propagation, node: fx.Node, operands: list[tuple[Labels | None, tuple[Any, ...]]]
) -> Labels | None:
    """Labels of an elementwise combination of operands given as (labels, shape).

    - two operands that carry channels on the same axes: their channels are equated;
    - an operand that varies along a channel axis without carrying channels there (a mask, a table, a per-head
      scalar) tells that axis's coordinates apart;
    - an operand that carries channels but is broadcast along a channel axis of the others (a per-head scale) is
      pinned and tells its coordinates apart in the others.
    """
    rank = len(shape_of(node))
    full = [(_align(own, rank), _align_shape(s, rank)) for own, s in operands]
    carried = [own for own, _ in full if own is not None]
    if not carried:
        return None
    out_shape = np.broadcast_shapes(*(own.shape for own in carried))
    channel_axes = [i for i, n in enumerate(out_shape) if n > 1]
    principal: list[Labels] = []
    apart: set[int] = set()
    for labels, shape in full:
        own = [i for i in channel_axes if labels is not None and labels.shape[i] > 1]
        broadcast = [i for i in channel_axes if i not in own and _is_one(shape[i])]
        varying = [i for i in channel_axes if i not in own and not _is_one(shape[i])]
        apart.update(varying)
        if labels is None or not own:
            continue
        if broadcast:
            state.pin(labels, f"{node.name} spreads it over other channels")
            apart.update(own)
        else:
            principal.append(labels)
    if not principal:
        # Outer product of two channel axes: nothing can be said about pairs.
        for labels in carried:
            state.pin(labels, f"{node.name} combines channels of different axes")
        return None
    result = np.ascontiguousarray(np.broadcast_to(principal[0], out_shape))
    for other in principal:
        state.equal(result, other)
    state.tell_apart(result, apart)
    return result


def _align(labels: Labels | None, rank: int) -> Labels | None:
    return None if labels is None else labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def _align_shape(shape: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    return (1,) * (rank - len(shape)) + shape


def _is_one(size: Any) -> bool:
    return _static(size) and size == 1


@rule(operator.getitem)
def _getitem(state: Propagation, node: fx.Node) -> Any:
    whole = read(state, node.args[0])  # type: ignore[arg-type]
    if isinstance(whole, (list, tuple)):
        return whole[node.args[1]]  # type: ignore[index]
    return None


@rule(aten.linear.default)
def _linear(state: Propagation, node: fx.Node) -> Labels | None:
    x, weight = node.args[0], source(node.args[1])  # type: ignore[arg-type]
    bias = node.args[2] if len(node.args) > 2 else None
    labels = value_of(state, x)
    if weight.name not in state.shapes:
        state.pin(labels, f"{node.name} multiplies with a computed weight")
        state.pin(value_of(state, weight), f"it is a computed weight of {node.name}")
        return None
    columns, rows = state.axis(weight.name, 1), state.axis(weight.name, 0)
    rank = len(shape_of(node))
    if labels is None or labels.shape[-1] != columns.size:
        state.pin(columns, f"its input {source(x).name} carries no channels of a parameter")  # type: ignore[arg-type]
    else:
        # Channels on other axes act like tokens here: the weight is shared over them.
        state.equal(labels, columns)
    state.inputs[node] = columns
    if isinstance(bias, fx.Node):
        root = source(bias)
        if root.name in state.shapes:
            state.equal(rows, state.axis(root.name, 0))
        else:
            state.pin(rows, f"the bias of {node.name} is computed")
    return rows.reshape((1,) * (rank - 1) + (-1,))


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _norm(state: Propagation, node: fx.Node) -> Labels | None:
    x, normalized = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    labels = value_of(state, x)
    affine = [a for a in node.args[2:4] if isinstance(a, fx.Node)]
    if labels is None or len(normalized) != 1:
        state.pin(labels, f"{node.name} normalizes over several axes")
        for a in affine:
            state.pin(value_of(state, a), f"{node.name} normalizes what carries no channels")
        return None
    state.saw_norm(labels)
    others = [i for i in range(labels.ndim - 1) if labels.shape[i] > 1]
    state.tell_apart(labels, others)
    operands: list[tuple[Labels | None, tuple[Any, ...]]] = [(labels, shape_of(node))]
    operands += [(value_of(state, a), shape_of(a)) for a in affine]
    return join(state, node, operands)


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.var.correction, aten.linalg_vector_norm.default,
      aten.var.dim)  # fmt: skip
def _reduce(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    position = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims = node.args[position] if len(node.args) > position else None
    axes = (
        list(range(labels.ndim))
        if dims is None
        else [dims]
        if isinstance(dims, int)
        else list(dims)
    )  # type: ignore[call-overload]
    axes = [a % labels.ndim for a in axes]
    keep = len(shape_of(node)) == labels.ndim
    reduced = [a for a in axes if labels.shape[a] > 1]
    if not reduced:
        return labels if keep else np.squeeze(labels, tuple(axes))
    # A symmetric function of the reduced channels: they may move, but only where the other axes stay put.
    state.saw_norm(labels)
    state.tell_apart(labels, [i for i in range(labels.ndim) if i not in axes])
    return None


@rule(aten.scaled_dot_product_attention.default)
def _attention(state: Propagation, node: fx.Node) -> Labels | None:
    for a in node.args[:2]:
        state.pin(value_of(state, a), f"it enters the attention scores of {node.name}")
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    state.pin(value_of(state, mask), f"it masks the attention of {node.name}")
    labels = value_of(state, node.args[2])
    if labels is None:
        return None
    if labels.shape[-2] > 1:
        state.pin(labels, f"its channels are the tokens of {node.name}")
        return None
    state.tell_apart(labels, range(labels.ndim - 2))
    heads = shape_of(node)[-3] if labels.ndim > 2 else 1
    if labels.ndim > 2 and labels.shape[-3] > 1 and _static(heads) and labels.shape[-3] != heads:
        labels = np.repeat(
            labels, heads // labels.shape[-3], axis=-3
        )  # grouped queries share a value head
    return labels


@rule(aten.matmul.default, aten.bmm.default)
def _matmul(state: Propagation, node: fx.Node) -> Labels | None:
    sides = [value_of(state, a) for a in node.args[:2]]
    shapes = [shape_of(a) for a in node.args[:2]]  # type: ignore[arg-type]
    rank = len(shape_of(node))
    if min(len(shapes[0]), len(shapes[1])) < 2:
        return _pin_inputs(state, node, f"{node.name} multiplies with a vector")
    for labels, contracted in zip(sides, (-1, -2), strict=True):
        if labels is not None and labels.shape[contracted] > 1:
            _pin_inputs(state, node, f"{node.name} sums over its channels")
            return None
    carried = [s for s in sides if s is not None and s.size > 1]
    if len(carried) != 1:
        _pin_inputs(state, node, f"{node.name} multiplies channels with channels")
        return None
    labels = _align(carried[0], rank)
    assert labels is not None
    other = shapes[1 if sides[0] is carried[0] else 0]
    varying = [i for i in range(rank - 2) if not _is_one(_align_shape(other, rank)[i])]
    state.tell_apart(labels, varying)
    return labels


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _convolution(state: Propagation, node: fx.Node) -> Labels | None:
    x, weight = node.args[0], source(node.args[1])  # type: ignore[arg-type]
    bias = node.args[2] if len(node.args) > 2 else None
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    labels = value_of(state, x)
    if weight.name not in state.shapes:
        return _pin_inputs(state, node, f"{node.name} convolves with a computed weight")
    rank = len(shape_of(node))
    rows, per_group = state.axis(weight.name, 0), state.shapes[weight.name][1]
    shape = [1] * rank
    shape[1] = -1
    spatial = labels is not None and any(n > 1 for i, n in enumerate(labels.shape) if i != 1)
    if labels is None or labels.shape[1] == 1 or spatial:
        state.pin(labels, f"{node.name} convolves over channels of other axes")
        state.pin(
            state.axis(weight.name, 1),
            f"the input of {node.name} carries no channels of a parameter",
        )
        if groups != 1:
            state.pin(rows, f"the input of {node.name} carries no channels of a parameter")
    elif groups == 1:
        state.equal(labels.reshape(-1), state.axis(weight.name, 1))
    elif per_group == 1 and labels.shape[1] == rows.size:
        state.equal(labels.reshape(-1), rows)
    else:
        state.pin(labels, f"{node.name} is a grouped convolution")
        state.pin(rows, f"{node.name} is a grouped convolution")
    if groups == 1:
        state.inputs[node] = state.axis(weight.name, 1)
    if isinstance(bias, fx.Node):
        root = source(bias)
        if root.name in state.shapes:
            state.equal(rows, state.axis(root.name, 0))
        else:
            state.pin(rows, f"the bias of {node.name} is computed")
    return rows.reshape(shape)


@rule(aten.embedding.default)
def _embedding(state: Propagation, node: fx.Node) -> Labels | None:
    table = source(node.args[0])  # type: ignore[arg-type]
    if table.name not in state.shapes:
        return None
    return state.axis(table.name, 1).reshape((1,) * (len(shape_of(node)) - 1) + (-1,))


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is not None and labels.shape[node.args[1]] > 1:  # type: ignore[index]
        state.pin(labels, f"{node.name} is a softmax over its channels")
        return None
    return labels


@rule(aten.cat.default, aten.concat.default)
def _cat(state: Propagation, node: fx.Node) -> Labels | None:
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(shape_of(node))
    axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore[operator]
    labels = [value_of(state, p) for p in parts]
    carried = [own for own in labels if own is not None]
    if not carried:
        return None
    if all(own.shape[axis] == 1 for own in carried) and not (
        all(own is not None for own in labels) and all(_is_one(shape_of(p)[axis]) for p in parts)
    ):
        # Tokens are joined: every part must agree on the channels.
        first = carried[0]
        for own, p in zip(labels, parts, strict=True):
            if own is None:
                state.pin(
                    first,
                    f"{node.name} joins it with {p.name}, which carries no channels of a parameter",
                )
            else:
                state.equal(first, own)
        return np.broadcast_to(first, np.broadcast_shapes(*(own.shape for own in carried))).copy()
    sizes = [shape_of(p)[axis] for p in parts]
    if not all(_static(s) for s in sizes):
        return _pin_inputs(state, node, f"{node.name} joins channels of unknown number")
    around = list(np.broadcast_shapes(*(tuple(np.delete(own.shape, axis)) for own in carried)))
    pieces = []
    for own, size in zip(labels, sizes, strict=True):
        shape = [*around[:axis], size, *around[axis:]]
        if own is None or own.shape[axis] != size:
            state.pin(own, f"{node.name} joins channels with tokens")
            own = state.fresh(int(np.prod(shape))).reshape(shape)
            state.pin(own, f"{node.name} joins a constant")
        pieces.append(np.broadcast_to(own, shape))
    result = np.concatenate(pieces, axis)
    state.pieces(result, axis, sizes)
    return result


@rule(aten.stack.default)
def _stack(state: Propagation, node: fx.Node) -> Labels | None:
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(shape_of(node))
    axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore[operator]
    labels = [value_of(state, p) for p in parts]
    carried = [own for own in labels if own is not None]
    if not carried:
        return None
    if len(carried) != len(labels):
        return _pin_inputs(state, node, f"{node.name} stacks it with a constant")
    result = np.stack(np.broadcast_arrays(*carried), axis)
    state.pieces(result, axis, [1] * len(carried))
    return result


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.unbind.int,
      aten.tensor_split.sections)  # fmt: skip
def _split(state: Propagation, node: fx.Node) -> Any:
    labels = value_of(state, node.args[0])
    values = node.meta["val"]
    if labels is None:
        return [None] * len(values)
    unbind = node.target is aten.unbind.int
    position = 1 if unbind else 2
    axis = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    axis = axis % labels.ndim  # type: ignore[operator]
    if labels.shape[axis] == 1:
        return [np.squeeze(labels, axis) if unbind else labels for _ in values]
    sizes = [1] * len(values) if unbind else [v.shape[axis] for v in values]
    if not all(_static(s) for s in sizes):
        return _pin_inputs(state, node, f"{node.name} cuts channels at unknown places")
    state.pieces(labels, axis, sizes)
    cuts = np.split(labels, np.cumsum(sizes)[:-1], axis)
    return [np.squeeze(c, axis) for c in cuts] if unbind else cuts


@rule(aten.slice.Tensor, aten.narrow.default)
def _slice(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    axis = (node.args[1] if len(node.args) > 1 else 0) % labels.ndim  # type: ignore[operator]
    if labels.shape[axis] == 1:
        return labels
    bounds = list(node.args[2:]) + [None] * 3
    if node.target is aten.narrow.default and all(_static(b) for b in bounds[:2]):
        bounds = [bounds[0], bounds[0] + bounds[1], 1]  # type: ignore[operator]
    if any(b is not None and not _static(b) for b in bounds[:3]):
        state.pin(labels, f"{node.name} cuts channels at unknown places")
        return None
    inside = np.zeros(labels.shape[axis], np.int64)
    index = slice(bounds[0], bounds[1], bounds[2])
    inside[index] = 1
    if inside.all() and (bounds[2] or 1) == 1:
        return labels
    shape = [1] * labels.ndim
    shape[axis] = -1
    # Which piece a channel is in tells it apart; equal cuts of one value by several slices stay compatible.
    coordinate = np.broadcast_to(inside.reshape(shape), labels.shape)
    state._tags.append((labels.ravel(), coordinate.ravel()))
    return labels[(slice(None),) * axis + (index,)]


@rule(aten.select.int)
def _select(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    axis, index = node.args[1] % labels.ndim, node.args[2]  # type: ignore[operator]
    if labels.shape[axis] == 1:
        return np.squeeze(labels, axis)
    if not _static(index):
        state.pin(labels, f"{node.name} picks an unknown channel")
        return None
    n = labels.shape[axis]
    state.pieces(labels, axis, [index % n, 1, n - index % n - 1])  # type: ignore[operator]
    return np.take(labels, index, axis)  # type: ignore[arg-type]


@rule(aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
      aten.unflatten.int, aten.view.dtype)  # fmt: skip
def _reshape(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    if node.target is aten.view.dtype:
        return _pin_inputs(state, node, f"{node.name} reads its bits as another type")
    result = reshape_labels(labels, shape_of(node.args[0]), shape_of(node))  # type: ignore[arg-type]
    if result is None:
        state.pin(labels, f"{node.name} mixes channels with tokens")
    return result


@rule(
    aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.numpy_T.default
)
def _permute(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    if node.target is aten.permute.default:
        return np.transpose(labels, [a % labels.ndim for a in node.args[1]])  # type: ignore[union-attr]
    if node.target is aten.movedim.int:
        return np.moveaxis(labels, node.args[1], node.args[2])  # type: ignore[arg-type]
    if node.target is aten.transpose.int:
        return np.swapaxes(labels, node.args[1], node.args[2])  # type: ignore[arg-type]
    return labels.T


@rule(aten.unsqueeze.default)
def _unsqueeze(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    return None if labels is None else np.expand_dims(labels, node.args[1])  # type: ignore[arg-type]


@rule(aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
def _squeeze(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    result = squeeze_to(labels, shape_of(node.args[0]), shape_of(node))  # type: ignore[arg-type]
    if result is None:
        state.pin(labels, f"{node.name} drops an axis of unknown size")
    return result


@rule(aten.expand.default, aten.expand_as.default)
def _expand(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    return None if labels is None else expand_rule(labels, len(shape_of(node)))


@rule(aten.repeat.default, aten.tile.default)
def _repeat(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    counts = list(node.args[1])  # type: ignore[arg-type]
    labels = expand_rule(labels, len(counts))
    if any(
        n > 1 and not (_static(c) and c >= 1) for n, c in zip(labels.shape, counts, strict=True)
    ):
        state.pin(labels, f"{node.name} repeats channels an unknown number of times")
        return None
    return np.tile(labels, [c if n > 1 else 1 for n, c in zip(labels.shape, counts, strict=True)])


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if labels is None:
        return None
    if dim is None or not _static(node.args[1]):
        state.pin(labels, f"{node.name} flattens and repeats channels")
        return None
    axis = dim % labels.ndim  # type: ignore[operator]
    return labels if labels.shape[axis] == 1 else np.repeat(labels, node.args[1], axis)  # type: ignore[arg-type]


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    amounts = list(node.args[1])  # type: ignore[arg-type]
    for i in range(0, len(amounts), 2):
        axis = labels.ndim - 1 - i // 2
        before, after = amounts[i], amounts[i + 1]
        if labels.shape[axis] == 1 or before == after == 0:
            continue
        if not (_static(before) and _static(after) and before >= 0 and after >= 0):
            state.pin(labels, f"{node.name} pads channels by an unknown number")
            return None
        parts = [labels]
        for count, where in ((before, 0), (after, 2)):
            shape = list(labels.shape)
            shape[axis] = count
            extra = state.fresh(int(np.prod(shape))).reshape(shape)
            state.pin(extra, f"{node.name} pads with a constant")
            parts.insert(where, extra)
        sizes = [p.shape[axis] for p in parts]
        labels = np.concatenate(parts, axis)
        state.pieces(labels, axis, sizes)
    return labels
