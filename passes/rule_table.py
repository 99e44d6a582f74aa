"""The table of rules and what rules are made of: reading labels, pinning, and joining operands elementwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from pq_fx.passes.channels import Labels, Propagation, read
from pq_fx.passes.nodes import is_one, shape_of

Rule = Callable[[Propagation, fx.Node], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Enter a function into the table for these operations."""

    def enter(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return enter


def value_of(state: Propagation, argument: Any) -> Labels | None:
    """The labels of an argument that should be one tensor; None where it carries no channels."""
    if not isinstance(argument, fx.Node):
        return None
    labels = read(state, argument)
    return labels if isinstance(labels, np.ndarray) else None


def pin_inputs(state: Propagation, node: fx.Node, reason: str) -> Labels | None:
    """Pin all inputs; the value carries no channels, which is what a rule then returns."""
    for argument in node.all_input_nodes:
        labels = read(state, argument)
        for item in labels if isinstance(labels, (list, tuple)) else [labels]:
            state.pin(item, reason)
    return None


def join(
    state: Propagation, node: fx.Node, operands: list[tuple[Labels | None, tuple[Any, ...]]]
) -> Labels | None:
    """Labels of an elementwise combination of operands given as (labels, shape).

    - two operands that carry channels on the same axes: their channels are equated;
    - an operand that varies along a channel axis without carrying channels there (a mask, a table, a per-head
      scalar) tells that axis's coordinates apart;
    - an operand that carries channels but is broadcast along a channel axis of the others (a per-head scale) is
      pinned and tells its coordinates apart in the others.
    """
    rank = len(shape_of(node))
    full = [(align(own, rank), align_shape(s, rank)) for own, s in operands]
    carried = [own for own, _ in full if own is not None]
    if not carried:
        return None
    out_shape = np.broadcast_shapes(*(own.shape for own in carried))
    channel_axes = [i for i, n in enumerate(out_shape) if n > 1]
    principal: list[Labels] = []
    apart: set[int] = set()
    for labels, shape in full:
        own = [i for i in channel_axes if labels is not None and labels.shape[i] > 1]
        broadcast = [i for i in channel_axes if i not in own and is_one(shape[i])]
        varying = [i for i in channel_axes if i not in own and not is_one(shape[i])]
        apart.update(varying)
        if labels is None or not own:
            continue
        if broadcast:
            state.pin(labels, f"{node.name} spreads it over other channels")
            apart.update(own)
        else:
            principal.append(labels)
    if not principal:
        # Outer product of two channel axes: nothing can be said about pairs.
        for labels in carried:
            state.pin(labels, f"{node.name} combines channels of different axes")
        return None
    result = np.ascontiguousarray(np.broadcast_to(principal[0], out_shape))
    for other in principal:
        state.equal(result, other)
    state.tell_apart(result, apart)
    return result


def align(labels: Labels | None, rank: int) -> Labels | None:
    """Labels with axes of size 1 put in front, up to `rank`."""
    return None if labels is None else labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def align_shape(shape: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """A shape with axes of size 1 put in front, up to `rank`."""
    return (1,) * (rank - len(shape)) + shape
