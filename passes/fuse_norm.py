"""A norm, its modulation and the quantizer that alone reads it become one operation.

Before                                          After
    n = aten.layer_norm(x, [K])                     d, s = pq.norm_quantize(x, "layer", ..., scale, shift, perm, ...)
    h = aten.add(aten.mul(n, 1 + scale), shift)
    d, s = pq.quantize(h, perm, ...)
"""

from __future__ import annotations

import torch
from torch import fx

from pq_fx.passes.nodes import shape_of
from pq_fx.passes.patterns import match_norm
from pq_fx.passes.rewrite import private, replace

pq = torch.ops.pq


def fuse_norm(graph: fx.Graph) -> int:
    """Apply the rewrite; returns how often it matched. Runs after `share_quantize`."""
    fused = 0
    for node in graph.find_nodes(op="call_function", target=pq.quantize.default):
        match = match_norm(node.args[0])
        if match is None or not private(match.nodes, node):
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
        replace(graph, node, new)
        fused += 1
    return fused
