"""The quarter turn of rotary embeddings, read once instead of twice.

Before                                          After
    v = aten.view(x, [.., -1, 2])                   v = aten.view(x, [.., -1, 2])
    a, b = aten.unbind(v, -1)                       sign = aten.arange(2) * 2 - 1            [-1, 1]
    r = aten.stack([aten.neg(b), a], -1)            r = aten.flip(v, [-1]) * sign

Bit for bit the same. Inductor turns the stack into two masked reads of x, each with all that comes before it (the norm
of queries and keys, its weights) computed again; the flip is one read at another index.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pq_fx.passes.nodes import shape_of, tensor_meta
from pq_fx.passes.rewrite import evaluate, replace

aten = torch.ops.aten


def rotate_pairs(graph: fx.Graph) -> int:
    """Apply the rewrite; returns how often it matched."""
    rotated = 0
    for node in graph.find_nodes(op="call_function", target=aten.stack.default):
        pairs = _pairs(node)
        if pairs is None:
            continue
        meta = tensor_meta(pairs)
        assert meta is not None

        def call(target: Any, *args: Any, like: fx.Node = pairs, **kwargs: Any) -> fx.Node:
            new = graph.call_function(target, args, kwargs)
            evaluate(new, like)
            return new

        with graph.inserting_before(node):
            place = {"dtype": meta.dtype, "device": meta.device, "pin_memory": False}
            sign = call(aten.arange.default, 2, **place)
            sign = call(aten.sub.Tensor, call(aten.mul.Tensor, sign, 2), 1)
            turned = call(aten.mul.Tensor, call(aten.flip.default, pairs, [-1]), sign)
        replace(graph, node, turned)
        rotated += 1
    return rotated


def _pairs(node: fx.Node) -> fx.Node | None:
    """v [.., 2] of floats, where node = stack([-v[.., 1], v[.., 0]], -1)."""
    tensors: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    if len(tensors) != 2 or axis not in (-1, len(shape_of(node)) - 1):
        return None
    negated, first = tensors
    if negated.target is not aten.neg.default:
        return None
    unbound = {_element(negated.args[0], 1), _element(first, 0)}
    source = unbound.pop()
    if unbound or source is None or source.target is not aten.unbind.int:
        return None
    pairs: fx.Node = source.args[0]  # type: ignore[assignment]
    last = source.args[1] if len(source.args) > 1 else 0
    meta = tensor_meta(pairs)
    if meta is None or last not in (-1, meta.dim() - 1) or not meta.dtype.is_floating_point:
        return None
    return pairs


def _element(node: fx.Node, index: int) -> fx.Node | None:
    """The node of which this is element `index`."""
    if node.target is not operator.getitem or node.args[1] != index:
        return None
    return node.args[0]  # type: ignore[return-value]
