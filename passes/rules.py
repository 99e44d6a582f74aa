"""What each ATen operation does to channels: one rule a family of operations, in one table.

A rule gets the propagation state and the node and returns the labels of the node's value (channels.py says what
labels are). Its duty is soundness: whatever it cannot prove equivariant, it tells apart or pins. An operation that
is not in the table and is not elementwise pins all its inputs. The rules are in rules_mixing.py and rules_layout.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pq_fx.passes import rules_layout, rules_mixing  # noqa: F401  (they enter their rules into the table)
from pq_fx.passes.channels import Labels, Propagation
from pq_fx.passes.nodes import is_identity, tensor_meta
from pq_fx.passes.rule_table import RULES, join, pin_inputs, value_of

# Operations that yield nothing and change nothing.
CHECKS = {
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range_for_size",
    "observe",
}


def apply_rule(state: Propagation, node: fx.Node) -> Any:
    """The labels of a call_function node's value."""
    target = node.target
    if is_identity(node):
        return value_of(state, node.args[0])
    if target in RULES:
        return RULES[target](state, node)
    schema = getattr(target, "_schema", None)
    if schema is not None and schema.name.split("::")[-1] in CHECKS:
        return None
    if schema is not None and schema.is_mutable:
        return pin_inputs(state, node, f"{node.name} ({target}) writes in place")
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return pointwise(state, node)
    return pin_inputs(state, node, f"no rule for {target} ({node.name})")


def pointwise(state: Propagation, node: fx.Node) -> Labels | None:
    """Equate operands coordinate by coordinate; see `_join` for broadcasting."""
    operands = [a for a in node.all_input_nodes if tensor_meta(a) is not None]
    return join(state, node, [(value_of(state, a), tuple(tensor_meta(a).shape)) for a in operands])  # type: ignore[union-attr]
