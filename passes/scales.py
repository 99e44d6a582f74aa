"""What takes over a scale and an offset of a tensor's channels: the parameters that produce it.

    before   h = rms_norm(x, w); y = linear(h / s, W)         v = linear(x, Wv); y = linear(attention(q, k, v) / s, W)
    after    h = rms_norm(x, w / s); y = linear(h, W)         v = linear(x, Wv / s); y = linear(attention(q, k, v), W)

    before   a, b = linear(t, Wm, bm).chunk(2); h = layer_norm(x) * (1 + a) + b; y = linear((h - m) / s, W)
    after    a, b = linear(t, Wm / s, bm').chunk(2); h = ...; y = linear(h, W)     (1 + a) / s and (b - m) / s

The walk goes from the tensor towards its inputs and passes only through operations that a scale of
channels commutes with: layout, casts, attention from its values, the linear half of a gated unit.
It ends at norms with an affine weight, at linears, and at a modulated norm whose scale and shift
are rows of one linear. An offset commutes with layout and attention (its weights sum to 1), and
ends at a bias. Whatever else reads a tensor on the way would see the change too, so then there is
no fold. What is not proven stays an explicit multiplication.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from pq_fx.passes.nodes import is_identity, shape_of, tensor_meta
from pq_fx.passes.patterns import NORMS, match_norm

aten = torch.ops.aten
_LAYOUT = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.contiguous.default, aten.clone.default, aten._to_copy.default, aten.to.dtype, aten.flatten.using_ints,
    aten.unflatten.int, aten.detach.default, aten.alias.default, aten.squeeze.dim, aten.unsqueeze.default,
    aten.dropout.default,
}  # fmt: skip
_SDPA = aten.scaled_dot_product_attention.default
_LINEAR = aten.linear.default
_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
# Readers that do not compute with the values: the observer of calibration, and sizes where shapes are dynamic.
_WATCHERS = ("pq.observe.default", "aten.sym_size.int", "aten.sym_numel.default")


KINDS = ("factor", "offset", "one_plus")


@dataclass(frozen=True)
class Absorber:
    """Positions `start:stop` of a parameter's first axis, which take over (x - m) / s of a tensor's channels.

    `kind` says how a value v of the parameter becomes v': "factor": v / s; "offset": (v - m) / s;
    "one_plus": (1 + v) / s - 1. `aligned`: position start + k belongs to column k; otherwise which
    channel a position holds is the region's to say.
    """

    param: str
    kind: str
    start: int
    stop: int
    aligned: bool


def absorbers(
    point: fx.Node, readers: Collection[fx.Node], params: Collection[str]
) -> tuple[Absorber, ...]:
    """What takes over a change of `point`'s last axis; empty: nothing does. Without an "offset" m must be 0.

    `readers` are the linears whose weights take the inverse; `params` are names of parameter placeholders.
    """
    found: list[Absorber] = []
    return tuple(dict.fromkeys(found)) if _walk(point, set(readers), params, found) else ()


def _walk(
    node: fx.Node,
    allowed: set[fx.Node],
    params: Collection[str],
    found: list[Absorber],
    offset: bool = True,
    aligned: bool = True,
) -> bool:
    """Whether every value behind `node` takes the scale; `offset`: an offset commutes so far, `aligned`: channels
    stand where they stood."""
    if node.op != "call_function" or not _only_read_by(node, allowed):
        return False
    inside = allowed | {node}
    if node.target in _LAYOUT:
        before = node.args[0]
        if not isinstance(before, fx.Node):
            return False
        aligned = aligned and _keeps_channels(node, before)
        return _walk(before, inside, params, found, offset, aligned)
    if node.target is _SDPA:
        value = node.args[2]
        return isinstance(value, fx.Node) and _walk(value, inside, params, found, offset, False)
    if node.target is aten.mul.Tensor:
        return _walk_product(node, inside, params, found, aligned)
    if node.target is aten.add.Tensor:
        return offset and aligned and _walk_modulated(node, allowed, params, found)
    weight, bias = [*node.args[1:], None, None][:2] if node.target is _LINEAR else (None, None)
    if node.target in NORMS:
        weight, bias = [*node.args[2:], None, None][:2]
        bias = bias if NORMS[node.target] == "layer" else None
    if weight is None:  # nothing to scale; a bias of a layer norm follows its weight
        return False
    kinds = ((weight, "factor"), (bias, "offset" if offset else "factor"))
    return _take(kinds, params, found, aligned=aligned and node.target in NORMS)


def _walk_product(
    node: fx.Node,
    inside: set[fx.Node],
    params: Collection[str],
    found: list[Absorber],
    aligned: bool,
) -> bool:
    """One factor takes the scale: a parameter over channels (an unfused norm's weight), or a value."""
    factors = [f for f in node.args[:2] if isinstance(f, fx.Node)]
    for factor in factors:
        meta = tensor_meta(factor)
        if factor.op == "placeholder" and meta is not None and meta.dim() == 1:
            return _take(((factor, "factor"),), params, found, aligned=aligned)
    for factor in factors:
        trial: list[Absorber] = []
        if str(shape_of(factor)) == str(shape_of(node)) and _walk(
            factor, inside, params, trial, False, aligned
        ):
            found += trial
            return True
    return False


def _walk_modulated(
    node: fx.Node, allowed: set[fx.Node], params: Collection[str], found: list[Absorber]
) -> bool:
    """norm(x) * (1 + scale) + shift without an affine weight, scale and shift rows of linears with biases."""
    match = match_norm(node)
    if match is None or match.weight is not None or match.mod_scale is None:
        return False
    adds = [u for u in match.mod_scale.users if str(u.target) not in _WATCHERS]
    if match.mod_shift is None or len(adds) != 1:
        return False
    inside = allowed | {*match.nodes}
    one_plus = adds[0]
    if not all(_only_read_by(n, inside) for n in (*match.nodes, one_plus)):
        return False
    return _take_rows(match.mod_scale, inside | {one_plus}, params, found, "one_plus") and (
        _take_rows(match.mod_shift, inside, params, found, "offset")
    )


def _take_rows(
    node: fx.Node,
    inside: set[fx.Node],
    params: Collection[str],
    found: list[Absorber],
    kind: str,
) -> bool:
    """`node` [B, 1, K] is some rows of a linear's output [B, N], cut out on the last axis; its bias takes `kind`."""
    start, size = 0, shape_of(node)[-1]
    while _only_read_by(node, inside):
        inside = inside | {node}
        if node.target is _LINEAR and node.args[2:] and node.args[2] is not None:
            kinds = ((node.args[1], "factor"), (node.args[2], kind))
            return _take(kinds, params, found, aligned=True, start=start, stop=start + size)
        split = node.args[0] if node.args else None
        if not isinstance(split, fx.Node):
            return False
        if is_identity(node) or node.target is aten.unsqueeze.default or _cuts_rows(node):
            node = split
            continue
        if node.target is not operator.getitem or split.target not in _SPLITS or start:
            return False
        parts = [part.shape for part in split.meta["val"]]
        axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        if axis not in (-1, len(parts[0]) - 1) or not all(isinstance(p[-1], int) for p in parts):
            return False
        start = sum(p[-1] for p in parts[: node.args[1]])  # type: ignore[misc]
        whole = split.args[0]
        # The other parts are other rows.
        if not isinstance(whole, fx.Node) or not _only_read_by(whole, {split}):
            return False
        node, inside = whole, inside | {split}
    return False


def _cuts_rows(node: fx.Node) -> bool:
    """A slice of another axis than the last: Dynamo writes x[:, None] with one where the batch is dynamic."""
    axis = node.args[1] if len(node.args) > 1 else 0
    return node.target is aten.slice.Tensor and axis not in (-1, len(shape_of(node)) - 1)


def _keeps_channels(node: fx.Node, before: fx.Node) -> bool:
    """Whether the last axis is the same before and after an operation of layout."""
    rank = len(shape_of(node))
    if node.target is aten.transpose.int:
        return all(d not in (-1, rank - 1) for d in node.args[1:3])
    if node.target is aten.permute.default:
        return node.args[1][-1] in (-1, rank - 1)  # type: ignore[index]
    return str(shape_of(node)[-1:]) == str(shape_of(before)[-1:])


def _take(
    kinds: Collection[tuple[object, str]],
    params: Collection[str],
    found: list[Absorber],
    *,
    aligned: bool,
    start: int = 0,
    stop: int | None = None,
) -> bool:
    for node, kind in kinds:
        if node is None:
            continue
        if not isinstance(node, fx.Node) or node.name not in params or len(node.users) != 1:
            return False
        end = int(shape_of(node)[0]) if stop is None else stop
        found.append(Absorber(node.name, kind, start, end, aligned))
    return True


def _only_read_by(node: fx.Node, allowed: set[fx.Node]) -> bool:
    return all(
        user in allowed
        or str(user.target) in _WATCHERS
        or (is_identity(user) and _only_read_by(user, allowed))
        for user in node.users
    )
