"""Lowering a converted model's graph: what a quantizer reads is fused into the kernel that quantizes it.

Before                                              After
    n = aten.layer_norm(x, [K])                         d, s = pq.norm_quantize(x, "layer", ..., perm, ...)
    h = aten.add(aten.mul(n, 1 + scale), shift)         q = pq.linear(d, s, ..., Wq)
    d1, s1 = pq.quantize(h, perm, ...)                  k = pq.linear(d, s, ..., Wk)
    q = pq.linear(d1, s1, ..., Wq)
    d2, s2 = pq.quantize(h, perm, ...)
    k = pq.linear(d2, s2, ..., Wk)

    h = aten.gelu(x); d, s = pq.quantize(h, ...)        d, s = pq.act_quantize(x, None, "gelu", ...)

Three rewrites in this order, each a function of the graph that returns how often it matched: `share_quantize` first,
so that the fusions see one user; then `fuse_norm` and `fuse_act`. No permute operation is left: every order is an
argument of a quantize kernel or already in the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from pq_fx.passes.patterns import match_act, match_norm
from pq_fx.passes.rules import is_identity, shape_of, tensor_meta

pq = torch.ops.pq


@dataclass(frozen=True)
class Lowered:
    """How often each rewrite matched."""

    shared: int
    norms: int
    acts: int


def lower(gm: fx.GraphModule) -> Lowered:
    """Apply the three rewrites to a pre-dispatch ATen graph in place and clean up."""
    counts = [rewrite(gm.graph) for rewrite in REWRITES]
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return Lowered(*counts)


def _quantizers(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=pq.quantize.default)


def _canonical(node: fx.Node) -> fx.Node:
    """Follow identities that keep the dtype: a quantizer reads the same numbers on either side."""
    while is_identity(node):
        before: fx.Node = node.args[0]  # type: ignore[assignment]
        meta, own = tensor_meta(before), tensor_meta(node)
        if meta is None or own is None or meta.dtype != own.dtype:
            break
        node = before
    return node


def share_quantize(graph: fx.Graph) -> int:
    """Quantizers with the same input and settings become one."""
    first: dict[tuple[object, ...], fx.Node] = {}
    merged = 0
    for node in _quantizers(graph):
        x = _canonical(node.args[0])  # type: ignore[arg-type]
        key = (x, *node.args[1:], *node.kwargs.items())
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
            merged += 1
        else:
            node.update_arg(0, x)
            first[key] = node
    return merged


def fuse_norm(graph: fx.Graph) -> int:
    """A norm, its modulation and the quantizer that alone reads it become one operation."""
    fused = 0
    for node in _quantizers(graph):
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        match = match_norm(x)
        if match is None or not _private(match.nodes, node):
            continue
        rank = len(shape_of(match.x))
        mods = [m for m in (match.mod_scale, match.mod_shift) if m is not None]
        # The kernel reads one row of modulation a sample, [B, 1, K]; other layouts stay apart.
        if any(len(shape_of(m)) != 3 or rank != 3 for m in mods):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(
                pq.norm_quantize.default,
                (
                    match.x,
                    match.norm,
                    match.weight,
                    match.bias,
                    match.eps,
                    match.mod_scale,
                    match.mod_shift,
                    *node.args[1:],
                ),
            )
        _replace(graph, node, new)
        fused += 1
    return fused


def fuse_act(graph: fx.Graph) -> int:
    """An activation function (gated or not) and the quantizer that alone reads it become one operation."""
    fused = 0
    for node in _quantizers(graph):
        match = match_act(node.args[0])  # type: ignore[arg-type]
        if match is None or not _private(match.nodes, node):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(
                pq.act_quantize.default, (match.x, match.gate, match.act, None, *node.args[1:])
            )
        _replace(graph, node, new)
        fused += 1
    return fused


REWRITES: tuple[Callable[[fx.Graph], int], ...] = (share_quantize, fuse_norm, fuse_act)


def _private(nodes: tuple[fx.Node, ...], last: fx.Node) -> bool:
    """True where the matched nodes are read by each other, by casts and copies of them and by `last` only."""
    inside = {*nodes, last}
    for node in nodes:
        todo = list(node.users)
        while todo:
            user = todo.pop()
            if user in inside:
                continue
            if not is_identity(user):
                return False
            todo += list(user.users)
    return True


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def quantized_operations(gm: fx.GraphModule) -> dict[str, int]:
    """How many of each pq operation a graph holds, for logs and tests."""
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            name = str(node.target)
            if name.startswith("pq."):
                counts[name.split(".")[1]] = counts.get(name.split(".")[1], 0) + 1
    return counts
