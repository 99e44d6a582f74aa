"""Rules of what mixes channels or tokens: linear, convolution, norms, reductions, attention, products, look-ups."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from pq_fx.passes.channels import Labels, Propagation
from pq_fx.passes.nodes import is_one, is_static, shape_of, source
from pq_fx.passes.rule_table import align, align_shape, join, pin_inputs, rule, value_of

aten = torch.ops.aten


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
    if labels.ndim > 2 and labels.shape[-3] > 1 and is_static(heads) and labels.shape[-3] != heads:
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
        return pin_inputs(state, node, f"{node.name} multiplies with a vector")
    for labels, contracted in zip(sides, (-1, -2), strict=True):
        if labels is not None and labels.shape[contracted] > 1:
            pin_inputs(state, node, f"{node.name} sums over its channels")
            return None
    carried = [s for s in sides if s is not None and s.size > 1]
    if len(carried) != 1:
        pin_inputs(state, node, f"{node.name} multiplies channels with channels")
        return None
    labels = align(carried[0], rank)
    assert labels is not None
    other = shapes[1 if sides[0] is carried[0] else 0]
    varying = [i for i in range(rank - 2) if not is_one(align_shape(other, rank)[i])]
    state.tell_apart(labels, varying)
    return labels


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _convolution(state: Propagation, node: fx.Node) -> Labels | None:
    x, weight = node.args[0], source(node.args[1])  # type: ignore[arg-type]
    bias = node.args[2] if len(node.args) > 2 else None
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    labels = value_of(state, x)
    if weight.name not in state.shapes:
        return pin_inputs(state, node, f"{node.name} convolves with a computed weight")
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
