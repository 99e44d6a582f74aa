"""Lowering a converted model's graph: what a quantizer reads is fused into the kernel that quantizes it.

Each rewrite is a pass in a file of its own, whose docstring shows the graph before and after. They run in this order:
`share_quantize` first, so that the fusions see one user; `fuse_norm`; `fuse_act`; `merge_linears`; `join_norms`;
`rotate_pairs`. No permute operation is left: every order is an argument of a quantize kernel or already in the
weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx

from pq_fx.passes.fuse_act import fuse_act
from pq_fx.passes.fuse_norm import fuse_norm
from pq_fx.passes.join_norms import join_norms
from pq_fx.passes.merge_linears import merge_linears
from pq_fx.passes.rotate_pairs import rotate_pairs
from pq_fx.passes.share_quantize import share_quantize


@dataclass(frozen=True)
class Lowered:
    """How often each rewrite matched; `others` are rewrites that are not pq_fx's, by function name."""

    shared: int
    norms: int
    acts: int
    merged: int
    joined_norms: int
    rotations: int
    others: dict[str, int] = field(default_factory=dict)


Rewrite = Callable[[fx.Graph], int]
REWRITES: tuple[Rewrite, ...] = (
    share_quantize,
    fuse_norm,
    fuse_act,
    merge_linears,
    join_norms,
    rotate_pairs,
)


def lower(gm: fx.GraphModule, rewrites: Sequence[Rewrite] = REWRITES) -> Lowered:
    """Apply the rewrites in order to a pre-dispatch ATen graph in place and clean up.

    A rewrite of your own goes into the sequence: `lower(gm, (*REWRITES, mine))` (docs/reuse.md).
    """
    counts: dict[Rewrite, int] = {rewrite: rewrite(gm.graph) for rewrite in rewrites}
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    others = {r.__name__: n for r, n in counts.items() if r not in REWRITES}
    return Lowered(
        shared=counts.get(share_quantize, 0),
        norms=counts.get(fuse_norm, 0),
        acts=counts.get(fuse_act, 0),
        merged=counts.get(merge_linears, 0),
        joined_norms=counts.get(join_norms, 0),
        rotations=counts.get(rotate_pairs, 0),
        others=others,
    )


def quantized_operations(gm: fx.GraphModule) -> dict[str, int]:
    """How many of each pq operation a graph holds, for logs and tests."""
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            name = str(node.target)
            if name.startswith("pq."):
                counts[name.split(".")[1]] = counts.get(name.split(".")[1], 0) + 1
    return counts
