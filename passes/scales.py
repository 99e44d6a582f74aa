"""Where a scale of a tensor's channels can be folded: into the parameters that produce it.

    before   h = rms_norm(x, w); y = linear(h / s, W)         v = linear(x, Wv); y = linear(attention(q, k, v) / s, W)
    after    h = rms_norm(x, w / s); y = linear(h, W)         v = linear(x, Wv / s); y = linear(attention(q, k, v), W)

The walk goes from the tensor towards its inputs and passes only through operations that a scale of
channels commutes with: layout, casts, attention from its values, the linear half of a gated unit.
It ends at norms with an affine weight (not modulated afterwards) and at linears. Whatever else
reads a tensor on the way would see the scale too, so then there is no fold. What is not proven
stays an explicit multiplication.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from pq_fx.passes.nodes import shape_of, tensor_meta
from pq_fx.passes.patterns import NORMS

aten = torch.ops.aten
_LAYOUT = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.contiguous.default, aten.clone.default, aten._to_copy.default, aten.to.dtype, aten.flatten.using_ints,
    aten.unflatten.int, aten.detach.default, aten.alias.default, aten.squeeze.dim, aten.unsqueeze.default,
    aten.dropout.default,
}  # fmt: skip
_SDPA = aten.scaled_dot_product_attention.default
_LINEAR = aten.linear.default
# Readers that do not compute with the values: the observer of calibration.
_WATCHERS = ("pq.observe.default",)


def scale_params(
    point: fx.Node, readers: Collection[fx.Node], params: Collection[str]
) -> tuple[str, ...]:
    """Names of the parameters whose first axis takes over a scale of `point`'s last axis; empty: none.

    `readers` are the linears whose weights take the inverse; `params` are names of parameter
    placeholders. For linears only weight and bias are named: which row holds which channel is the
    region's to say.
    """
    found: list[str] = []
    return tuple(dict.fromkeys(found)) if _walk(point, set(readers), params, found) else ()


def _walk(node: fx.Node, allowed: set[fx.Node], params: Collection[str], found: list[str]) -> bool:
    """Whether every value behind `node` takes the scale; names go to `found`."""
    if node.op != "call_function" or not _only_read_by(node, allowed):
        return False
    inside = allowed | {node}
    if node.target in _LAYOUT:
        before = node.args[0]
        return isinstance(before, fx.Node) and _walk(before, inside, params, found)
    if node.target is _SDPA:
        value = node.args[2]
        return isinstance(value, fx.Node) and _walk(value, inside, params, found)
    if node.target is aten.mul.Tensor:
        return _walk_product(node, inside, params, found)
    if node.target is _LINEAR:
        return _take(node.args[1:3], params, found)
    if node.target in NORMS:
        first = 2
        weight = node.args[first] if len(node.args) > first else None
        # Without a weight there is nothing to scale; a bias of a layer norm follows it.
        return isinstance(weight, fx.Node) and _take(
            node.args[2:4] if NORMS[node.target] == "layer" else node.args[2:3], params, found
        )
    return False


def _walk_product(
    node: fx.Node, inside: set[fx.Node], params: Collection[str], found: list[str]
) -> bool:
    """One factor takes the scale: a parameter over channels (an unfused norm's weight), or a value."""
    factors = [f for f in node.args[:2] if isinstance(f, fx.Node)]
    for factor in factors:
        meta = tensor_meta(factor)
        if factor.op == "placeholder" and meta is not None and meta.dim() == 1:
            return _take((factor,), params, found)
    for factor in factors:
        trial: list[str] = []
        if str(shape_of(factor)) == str(shape_of(node)) and _walk(factor, inside, params, trial):
            found += trial
            return True
    return False


def _take(nodes: Collection[object], params: Collection[str], found: list[str]) -> bool:
    for node in nodes:
        if node is None:
            continue
        if not isinstance(node, fx.Node) or node.name not in params or len(node.users) != 1:
            return False
        found.append(node.name)
    return True


def _only_read_by(node: fx.Node, allowed: set[fx.Node]) -> bool:
    return all(user in allowed or str(user.target) in _WATCHERS for user in node.users)
