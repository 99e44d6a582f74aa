"""An activation function (gated or not), what is concatenated before it, and the quantizer become one operation.

Before                                          After
    h = aten.mul(aten.silu(x), gate)                d, s = pq.act_quantize(x, gate, "silu", None, perm, ...)
    d, s = pq.quantize(h, perm, ...)

    h = aten.cat([attention, aten.gelu(x)], -1)     d, s = pq.act_quantize(x, None, "gelu", attention, perm, ...)
    d, s = pq.quantize(h, perm, ...)

The second is the last linear of blocks that read attention and MLP at once (FLUX, HunyuanVideo, Chroma): neither the
activation nor the concatenation is written to memory. Two concatenated tensors without an activation match as well.
"""

from __future__ import annotations

import torch
from torch import fx

from pq_fx.passes.nodes import shape_of, source
from pq_fx.passes.patterns import match_act
from pq_fx.passes.rewrite import canonical, private, replace

aten, pq = torch.ops.aten, torch.ops.pq


def fuse_act(graph: fx.Graph) -> int:
    """Apply the rewrite; returns how often it matched. Runs after `share_quantize`."""
    fused = 0
    for node in graph.find_nodes(op="call_function", target=pq.quantize.default):
        last: fx.Node = node.args[0]
        nodes: tuple[fx.Node, ...] = ()
        parts = _concatenated(source(last))
        before = None
        if parts is not None:
            nodes = (source(last),)
            before, last = canonical(parts[0]), parts[1]
        match = match_act(last)
        if match is not None and private((*nodes, *match.nodes), node):
            x, gate, act = match.x, match.gate, match.act
        elif before is not None and private(nodes, node):
            x, gate, act = canonical(last), None, "none"
        else:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(
                pq.act_quantize.default, (x, gate, act, before, *node.args[1:])
            )
        replace(graph, node, new)
        fused += 1
    return fused


def _concatenated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(first, second) of a concatenation of two tensors along the channels."""
    if node.target is not aten.cat.default:
        return None
    tensors = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(tensors, list | tuple) or len(tensors) != 2:
        return None
    if axis not in (-1, len(shape_of(node)) - 1):
        return None
    return tensors[0], tensors[1]
