"""Quantizers with the same input and settings become one.

Before                                          After
    d1, s1 = pq.quantize(h, perm, ...)              d, s = pq.quantize(h, perm, ...)
    q = pq.linear(d1, s1, ..., Wq)                  q = pq.linear(d, s, ..., Wq)
    d2, s2 = pq.quantize(h, perm, ...)              k = pq.linear(d, s, ..., Wk)
    k = pq.linear(d2, s2, ..., Wk)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from pq_fx.passes.rewrite import canonical

pq = torch.ops.pq


def share_quantize(graph: fx.Graph) -> int:
    """Apply the rewrite; returns how many quantizers went."""
    first: dict[tuple[object, ...], fx.Node] = {}
    merged = 0
    for node in graph.find_nodes(op="call_function", target=pq.quantize.default):
        x = canonical(node.args[0])
        key = (x, *node.args[1:], *node.kwargs.items())
        if key in first:
            _redirect(graph, node, first[key])
            merged += 1
        else:
            node.update_arg(0, x)
            first[key] = node
    return merged


def _redirect(graph: fx.Graph, node: fx.Node, first: fx.Node) -> None:
    """Readers of `node` read `first`, and the very same results of it: what follows compares them by node."""
    results = {n.args[1]: n for n in first.users if n.target is operator.getitem}
    for reader in list(node.users):
        same = results.get(reader.args[1]) if reader.target is operator.getitem else None
        if same is not None:
            reader.replace_all_uses_with(same)
            graph.erase_node(reader)
    node.replace_all_uses_with(first)
    graph.erase_node(node)
