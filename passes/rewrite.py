"""What graph rewrites share: who reads a node, replacing one node by another, the value of a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pq_fx.passes import _torch
from pq_fx.passes.nodes import is_identity, tensor_meta


def canonical(node: fx.Node) -> fx.Node:
    """Follow identities that keep the dtype: a quantizer reads the same numbers on either side."""
    while is_identity(node):
        before: fx.Node = node.args[0]  # type: ignore[assignment]
        meta, own = tensor_meta(before), tensor_meta(node)
        if meta is None or own is None or meta.dtype != own.dtype:
            break
        node = before
    return node


def private(nodes: tuple[fx.Node, ...], last: fx.Node) -> bool:
    """True where the matched nodes are read by each other, by casts and copies of them and by `last` only."""
    inside = {*nodes, last}
    for node in nodes:
        todo = list(node.users)
        while todo:
            user = todo.pop()
            if user in inside:
                continue
            if not is_identity(user):
                return False
            todo += list(user.users)
    return True


def replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """`new` takes the place of `old`, its metadata included."""
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def evaluate(node: fx.Node, like: fx.Node | None = None) -> None:
    """Give a new node its fake value, computed from its arguments' (or where `like` lives, if it has none)."""

    def value(argument: fx.Node) -> Any:
        return argument.meta["val"]

    args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs, None if like is None else value(like)))
    with next(v for v in leaves if _torch.is_fake(v)).fake_mode:
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
