"""RMS norms of two token streams that are concatenated next become one norm of the concatenation.

Before                                          After
    a = aten.rms_norm(x, [D], wx, eps)              xy = aten.cat([x, y], 1)
    b = aten.rms_norm(y, [D], wy, eps)              w = aten.cat([wx, wy], 1)             each expanded over its tokens
    q = aten.cat([a, b], 1)                         q = (xy * rsqrt(mean(xy ** 2) + eps) * w).to(x.dtype), in fp32

Joint attention norms the queries and keys of text and image with different weights. As written, Inductor computes each
stream's norm in two kernels, copies both into the concatenation, and rotates the result in another; this way it reads
either stream once and emits norm, concatenation and rotary embedding as one kernel. The arithmetic is rms_norm's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pq_fx.passes.nodes import shape_of, tensor_meta
from pq_fx.passes.rewrite import evaluate, private, replace

aten = torch.ops.aten


def join_norms(graph: fx.Graph) -> int:
    """Apply the rewrite; returns how often it matched."""
    joined = 0
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        norms = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else 0
        if not all(_is_norm(n) for n in norms) or len(norms) < 2:
            continue
        rank = len(shape_of(node))
        if axis % rank == rank - 1 or not private(tuple(norms), node):
            continue
        shapes = {(*n.args[1], n.args[3]) for n in norms}
        if len(shapes) > 1 or tensor_meta(node).dtype not in (torch.bfloat16, torch.float16):  # type: ignore[union-attr]
            continue
        _join(graph, node, norms, axis % rank)
        joined += 1
    return joined


def _is_norm(node: Any) -> bool:
    """aten.rms_norm of the last axis with a weight and an explicit epsilon."""
    if not isinstance(node, fx.Node) or node.target is not aten.rms_norm.default:
        return False
    args = node.args
    return len(args) == 4 and len(args[1]) == 1 and args[2] is not None and args[3] is not None  # type: ignore[arg-type]


def _join(graph: fx.Graph, node: fx.Node, norms: list[fx.Node], axis: int) -> None:
    rank, dtype, eps = len(shape_of(node)), tensor_meta(node).dtype, norms[0].args[3]  # type: ignore[union-attr]

    def call(target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        evaluate(new)
        return new

    with graph.inserting_before(node):
        weights = []
        for norm in norms:
            tokens = shape_of(norm)[axis]
            if not isinstance(tokens, int):
                tokens = call(aten.sym_size.int, norm.args[0], axis)
            shape = [tokens if i == axis else 1 for i in range(rank - 1)] + [-1]
            row = call(aten.view.default, norm.args[2], [1] * (rank - 1) + [-1])
            weights.append(call(aten.expand.default, row, shape))
        weight = call(aten.cat.default, weights, axis)
        x = call(aten.cat.default, [n.args[0] for n in norms], axis)
        wide = call(aten.to.dtype, x, torch.float32)
        square = call(aten.mean.dim, call(aten.mul.Tensor, wide, wide), [-1], True)
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, square, eps))
        y = call(aten.mul.Tensor, call(aten.mul.Tensor, wide, scale), weight)
        y = call(aten.to.dtype, y, dtype)
    replace(graph, node, y)
    for norm in norms:
        for user in norm.users:  # copies and casts that nobody reads any more
            graph.erase_node(user)
        graph.erase_node(norm)
