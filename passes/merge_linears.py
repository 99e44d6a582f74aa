"""Linears that read one quantized tensor run as one GEMM.

Before                                          After
    q = pq.linear(d, s, ..., Wq, ..., bq, dtype)    y = pq.linears(d, s, ..., [Wq, Wk, Wv], ..., [bq, bk, bv], dtype)
    k = pq.linear(d, s, ..., Wk, ..., bk, dtype)    q, k, v = aten.split_with_sizes(y, [Nq, Nk, Nv], -1)
    v = pq.linear(d, s, ..., Wv, ..., bv, dtype)

The packed weights stay where they are: they are decoded side by side into one fp8 operand. It pays wherever the weight
is decoded before a GEMM (carrier "e4m3"): fewer launches, fuller waves (FLUX.1 on an H100: 4096 x 3072 x 3072 runs at
1270, 4096 x 9216 x 3072 at 1430 TFLOP/s). Readers get strided slices, which Inductor's kernels, attention and the
quantizers take without a copy.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from pq_fx.passes.nodes import shape_of, tensor_meta
from pq_fx.passes.rewrite import evaluate

aten, pq = torch.ops.aten, torch.ops.pq
_DATA, _SCALE, _GLOBAL, _FORMAT = 0, 1, 2, 3
_WEIGHT, _WEIGHT_SCALE, _WEIGHT_GLOBAL, _WEIGHT_FORMAT, _BIAS, _DTYPE = 4, 5, 6, 7, 8, 9


def merge_linears(graph: fx.Graph) -> int:
    """Apply the rewrite; returns how many linears went into a joint one. Runs after `share_quantize`."""
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=pq.linear.default):
        a = node.args
        data = tensor_meta(a[_DATA])
        if data is None or data.dtype != torch.float8_e4m3fn:
            continue
        shared = (a[_DATA], a[_SCALE], a[_GLOBAL], a[_FORMAT], a[_WEIGHT_FORMAT], a[_DTYPE])
        alike = (a[_BIAS] is None, a[_WEIGHT_GLOBAL] is None)
        groups.setdefault((*shared, *alike), []).append(node)
    return sum(_merge(graph, nodes) for nodes in groups.values())


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> int:
    first = nodes[0]
    # Weights that are made later in the graph (none are, where they are a module's buffers) stay apart.
    nodes = [n for n in nodes if all(a < first for a in n.all_input_nodes)]
    if len(nodes) < 2:
        return 0

    def column(index: int) -> list[object]:
        return [n.args[index] for n in nodes]

    a = first.args
    with graph.inserting_before(first):
        joint = graph.call_function(
            pq.linears.default,
            (
                *a[:_WEIGHT],
                column(_WEIGHT),
                column(_WEIGHT_SCALE),
                column(_WEIGHT_GLOBAL),
                a[_WEIGHT_FORMAT],
                column(_BIAS),
                a[_DTYPE],
            ),
        )
        sizes = [int(shape_of(n)[-1]) for n in nodes]
        split = graph.call_function(aten.split_with_sizes.default, (joint, sizes, -1))
        parts = [graph.call_function(operator.getitem, (split, i)) for i in range(len(nodes))]
    joint.meta.update({k: v for k, v in first.meta.items() if k != "val"})
    for new in (joint, split, *parts):
        evaluate(new)
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)
    return len(nodes)
