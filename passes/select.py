"""Which linears are quantized and how, by what the graph shows: never by a model's name.

many rows (tokens)      weights and activations          attention and MLP projections
one row a sample        weights only                     AdaLN modulation: memory-bound, 28 % of FLUX's weights
embedder                left in 16 bits                  before any norm or attention: feeds everything, costs nothing
final projection        left in 16 bits                  nothing after it averages its error away
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from pq_fx.passes._torch import hint
from pq_fx.passes.nodes import is_identity, shape_of, source, tensor_meta

aten = torch.ops.aten
LINEAR = aten.linear.default
# An operation that mixes or normalizes channels or tokens; what comes before the first one is an embedder.
MIXING = {
    aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.native_layer_norm.default,
    aten.scaled_dot_product_attention.default, aten.softmax.int, aten.rsqrt.default, aten.matmul.default,
    aten.bmm.default,
}  # fmt: skip
# A linear whose input has this many times fewer rows than the widest one, one row a sample, only modulates.
FEW_ROWS = 16


@dataclass(frozen=True)
class Linear:
    """A linear of the graph: names of its node and parameters, its sizes, and how it should be treated."""

    node: fx.Node
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    rows: int
    treatment: str  # "quantize" | "weight_only" | "leave" (rules may overrule it) | "impossible"
    reason: str  # why, where it is not "quantize"


def select(
    gm: fx.GraphModule,
    params: set[str],
    hidden: Mapping[str, bool] | None = None,
    ends: bool = True,
) -> list[Linear]:
    """List the graph's linears with their treatment; `params` are the names of parameter placeholders.

    A graph may be a piece of a model: then `hidden` names the placeholders that hold what earlier pieces made by a
    linear, with whether a norm or attention lies before them, too, and `ends` says whether its output may be the
    model's: then it is of another width than what comes in.
    """
    after_linear, after_mixing = ancestry(gm, hidden or {})
    widths = {
        hint(shape_of(n)[-1])
        for n in gm.graph.find_nodes(op="placeholder")
        if hidden and hidden.get(n.name) and shape_of(n)
    }
    mixes = hidden is not None or any(n.target in MIXING for n in gm.graph.nodes)
    nodes = [n for n in gm.graph.nodes if n.target is LINEAR]
    most = max((_rows(n) for n in nodes), default=0)
    result = []
    for node in nodes:
        weight = source(node.args[1])
        bias = node.args[2] if len(node.args) > 2 else None
        meta = tensor_meta(weight)
        assert meta is not None
        out_features, in_features = (int(s) for s in meta.shape)
        treatment, reason = "quantize", ""
        if weight.name not in params:
            treatment, reason = "impossible", "its weight is computed in the graph, not a parameter"
        elif mixes and not after_linear[node] and not after_mixing[node]:
            treatment, reason = "leave", "embedder: it reads an input of the model"
        elif mixes and not after_mixing[node] and _feeds_linear(node, after_mixing):
            treatment, reason = "leave", "embedder: it comes before any norm or attention"
        elif mixes and ends and out_features not in widths and _is_final(node):
            treatment, reason = "leave", "final projection: it makes the model's output"
        elif _one_row(node) and _rows(node) * FEW_ROWS <= most:
            treatment, reason = "weight_only", "one row a sample: weights only"
        result.append(
            Linear(
                node,
                weight.name,
                source(bias).name if isinstance(bias, fx.Node) else None,
                in_features,
                out_features,
                _rows(node),
                treatment,
                reason,
            )
        )
    return result


def _rows(node: fx.Node) -> int:
    rows = 1
    for size in shape_of(node)[:-1]:
        rows *= hint(size)
    return rows


def _one_row(node: fx.Node) -> bool:
    """The input has one row for each entry of its first axis."""
    return all(isinstance(n, int) and n == 1 for n in shape_of(node)[1:-1])


def ancestry(
    gm: fx.GraphModule, hidden: Mapping[str, bool]
) -> tuple[dict[fx.Node, bool], dict[fx.Node, bool]]:
    """For each node: does its input depend on a linear; does its value depend on a mixing operation.

    `hidden` says so of placeholders, as in `select`.
    """
    after_linear: dict[fx.Node, bool] = {}
    after_mixing: dict[fx.Node, bool] = {}
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        known = node.op == "placeholder" and node.name in hidden
        after_linear[node] = known or any(after_linear[i] or i.target is LINEAR for i in inputs)
        after_mixing[node] = (
            node.target in MIXING
            or (known and hidden[node.name])
            or any(after_mixing[i] for i in inputs)
        )
    return after_linear, after_mixing


def _feeds_linear(node: fx.Node, after_mixing: dict[fx.Node, bool]) -> bool:
    """Does the value reach another linear before it meets anything normalized."""
    todo, seen = list(node.users), set()
    while todo:
        user = todo.pop()
        if user in seen or after_mixing[user]:
            continue
        seen.add(user)
        if user.target is LINEAR:
            return True
        todo += list(user.users)
    return False


def _is_final(node: fx.Node) -> bool:
    """Does the value go to the graph's output through nothing but layout, casts and functions of itself."""
    todo, seen, reached = list(node.users), {node}, False
    joins: list[fx.Node] = []
    while todo:
        user = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.op == "output":
            reached = True
            continue
        if user.target is LINEAR or user.target in MIXING:
            return False
        tensors = [i for i in user.all_input_nodes if tensor_meta(i) is not None]
        if len(tensors) > 1 and not is_identity(user):
            joins += tensors
        todo += list(user.users)
    # What it is joined with may be pieces of itself: a batch that is cut and stacked.
    return reached and all(i in seen for i in joins)
