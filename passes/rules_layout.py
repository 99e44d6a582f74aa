"""Rules of what moves channels about: cat, split, slice, index, reshape, permute, expand, repeat, pad."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from pq_fx.passes.channels import Labels, Propagation, read
from pq_fx.passes.layout import expand_rule, reshape_labels, squeeze_to
from pq_fx.passes.nodes import is_one, is_static, shape_of
from pq_fx.passes.rule_table import pin_inputs, rule, value_of

aten = torch.ops.aten


@rule(operator.getitem)
def _getitem(state: Propagation, node: fx.Node) -> Any:
    whole = read(state, node.args[0])  # type: ignore[arg-type]
    if isinstance(whole, (list, tuple)):
        return whole[node.args[1]]  # type: ignore[index]
    return None


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
        all(own is not None for own in labels) and all(is_one(shape_of(p)[axis]) for p in parts)
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
    if not all(is_static(s) for s in sizes):
        return pin_inputs(state, node, f"{node.name} joins channels of unknown number")
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
        return pin_inputs(state, node, f"{node.name} stacks it with a constant")
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
    if not all(is_static(s) for s in sizes):
        return pin_inputs(state, node, f"{node.name} cuts channels at unknown places")
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
    if node.target is aten.narrow.default and all(is_static(b) for b in bounds[:2]):
        bounds = [bounds[0], bounds[0] + bounds[1], 1]  # type: ignore[operator]
    if any(b is not None and not is_static(b) for b in bounds[:3]):
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
    state.tag(labels, coordinate)
    return labels[(slice(None),) * axis + (index,)]


@rule(aten.select.int)
def _select(state: Propagation, node: fx.Node) -> Labels | None:
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    axis, index = node.args[1] % labels.ndim, node.args[2]  # type: ignore[operator]
    if labels.shape[axis] == 1:
        return np.squeeze(labels, axis)
    if not is_static(index):
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
        return pin_inputs(state, node, f"{node.name} reads its bits as another type")
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
        n > 1 and not (is_static(c) and c >= 1) for n, c in zip(labels.shape, counts, strict=True)
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
    if dim is None or not is_static(node.args[1]):
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
        if not (is_static(before) and is_static(after) and before >= 0 and after >= 0):
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


@rule(aten.index.Tensor, aten.index_select.default)
def _index(state: Propagation, node: fx.Node) -> Labels | None:
    """Picking tokens by a computed index (position tables); picked channels may not move."""
    labels = value_of(state, node.args[0])
    if labels is None:
        return None
    if node.target is aten.index_select.default:
        axis, picks = node.args[1] % labels.ndim, 1  # type: ignore[operator]
    else:
        indices = list(node.args[1])  # type: ignore[arg-type]
        used = [i for i, index in enumerate(indices) if index is not None]
        if len(used) != 1 or not isinstance(indices[used[0]], fx.Node):
            return pin_inputs(state, node, f"{node.name} picks by several indices")
        axis, picks = used[0], len(shape_of(indices[used[0]]))
    if labels.shape[axis] != 1:
        state.pin(labels, f"{node.name} picks channels by a computed index")
        return None
    return labels.reshape(labels.shape[:axis] + (1,) * picks + labels.shape[axis + 1 :])


@rule(aten.pad_sequence.default)
def _pad_sequence(state: Propagation, node: fx.Node) -> Labels | None:
    """Sequences of unlike lengths become a batch; the padding is one number for all channels."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    labels = [value_of(state, p) for p in parts]
    carried = [own for own in labels if own is not None]
    if not carried:
        return None
    if len(carried) != len(labels) or any(own.shape[0] != 1 for own in carried):
        return pin_inputs(state, node, f"{node.name} batches channels with tokens")
    for own in carried[1:]:
        state.equal(carried[0], own)
    return carried[0][None]
