"""Reading norms, modulations and activation functions off a graph, for regions (who absorbs) and lower (what fuses).

A matcher starts at the tensor that is to be quantized and walks towards its inputs. It returns what it found as plain
data, or None; it never changes the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pq_fx.passes.nodes import shape_of, source, tensor_meta

aten = torch.ops.aten
NORMS = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}
ACTS = {aten.gelu.default: "gelu", aten.silu.default: "silu", aten.relu.default: "relu"}


@dataclass(frozen=True)
class NormMatch:
    """y = norm(x) * weight + bias, then y * (1 + mod_scale) + mod_shift; absent parts are None."""

    norm: str
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    mod_scale: fx.Node | None
    mod_shift: fx.Node | None
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class ActMatch:
    """y = act(x) * gate; gate is None where there is none."""

    act: str
    x: fx.Node
    gate: fx.Node | None
    nodes: tuple[fx.Node, ...]


def match_norm(node: fx.Node) -> NormMatch | None:
    """The norm (with its modulation) whose result `node` is.

    Matches `[add(] [mul(] norm(x) [, 1 + scale)] [, shift)]` with casts anywhere between, where scale and shift are
    broadcast over tokens ([B, 1, K], [1, 1, K] or [K]).
    """
    seen: list[fx.Node] = []
    node = _step(node, seen)
    shift = scale = None
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        parts = _split_operands(node)
        if parts is None:
            return None
        node, shift = _step(parts[0], seen), parts[1]
    if node.target is aten.mul.Tensor:
        parts = _split_operands(node)
        if parts is None:
            return None
        scale = _one_plus(parts[1])
        if scale is None:
            return None
        node = _step(parts[0], seen)
    if node.target not in NORMS:
        return None
    normalized = list(node.args[1])  # type: ignore[arg-type]
    if len(normalized) != 1:
        return None
    args = [*node.args, None, None, None][2:5]
    if node.target is aten.layer_norm.default:
        weight, bias, eps = args[0], args[1], args[2] if args[2] is not None else 1e-5
    else:
        weight, bias, eps = args[0], None, args[1]
    if eps is None:  # rms_norm's default is the epsilon of its input's dtype
        meta = tensor_meta(node.args[0])  # type: ignore[arg-type]
        assert meta is not None
        eps = torch.finfo(meta.dtype).eps
    x: Any = node.args[0]
    return NormMatch(NORMS[node.target], x, weight, bias, float(eps), scale, shift, tuple(seen))  # type: ignore[arg-type]


def match_act(node: fx.Node) -> ActMatch | None:
    """The activation function, gated or not, whose result `node` is: `act(x)` or `mul(act(x), gate)`."""
    seen: list[fx.Node] = []
    node = _step(node, seen)
    direct = _act_name(node)
    if direct is not None:
        return ActMatch(direct, node.args[0], None, tuple(seen))  # type: ignore[arg-type]
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return None
    first, second = node.args[0], node.args[1]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if str(shape_of(first)) != str(shape_of(second)):
        return None
    for a, b in ((first, second), (second, first)):
        inner = source(a)
        name = _act_name(inner)
        if name is not None:
            return ActMatch(name, inner.args[0], b, (*seen, inner))  # type: ignore[arg-type]
    return None


def _act_name(node: fx.Node) -> str | None:
    name = ACTS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    if (
        name == "gelu"
        and node.kwargs.get("approximate", (list(node.args[1:]) or ["none"])[0]) == "tanh"
    ):
        return "gelu_tanh"
    return name


def _step(node: fx.Node, seen: list[fx.Node]) -> fx.Node:
    node = source(node)
    seen.append(node)
    return node


def _split_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(full-size operand, operand broadcast over tokens) of a binary node."""
    a, b = node.args[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    for full, part in ((a, b), (b, a)):
        if _per_channel(part, shape_of(node)) and str(shape_of(full)) == str(shape_of(node)):
            return full, part
    return None


def _per_channel(part: fx.Node, shape: tuple[Any, ...]) -> bool:
    """[K], [1, .., K] or [B, 1, .., K]: constant over tokens."""
    own = shape_of(part)
    if not own or str(own[-1]) != str(shape[-1]):
        return False
    tokens = own[1:-1] if len(own) == len(shape) else own[:-1]
    return all(isinstance(n, int) and n == 1 for n in tokens)


def _one_plus(node: fx.Node) -> fx.Node | None:
    """scale, where node = 1 + scale."""
    node = source(node)
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = node.args[:2]
    if b == 1 and isinstance(a, fx.Node):
        return a
    if a == 1 and isinstance(b, fx.Node):
        return b
    return None
