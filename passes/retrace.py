"""Dynamo's graph -> pre-dispatch ATen, the one dialect that every pass reads.

Before (what Dynamo hands a backend)             After
    h = torch.nn.functional.layer_norm(x, (64,))      h = aten.layer_norm.default(x, [64])
    y = torch._C._nn.linear(h, w, b)                   y = aten.linear.default(h, w, b)
    z = y.unflatten(-1, (4, -1))                       z = aten.unflatten.int(y, -1, [4, -1])

Semantic operations stay whole and have one schema each, so patterns are written once; `torch.export` programs are
in this dialect already (`torch.export.export(..., strict=False)`). The placeholders keep their order, which makes
the index of a placeholder the link to the caller's arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pq_fx.errors import GraphError
from pq_fx.passes import _torch
from pq_fx.passes.replay import Retracer

# Dynamo's attributes of placeholders that compile_fx needs again on a copy of the graph (pytorch issue 141640).
_PLACEHOLDER_META = ("tensor_dict", "grapharg", "example_value", "stack_trace")


def retrace(gm: fx.GraphModule) -> fx.GraphModule:
    """Return `gm` (as Dynamo made it) as a new module of pre-dispatch ATen operations.

    The result has the same placeholders in the same order, `meta["val"]` on every node, and the attributes that
    `compile_fx` looks for. Nothing is specialized: symbolic sizes stay symbolic. Raises GraphError when a
    placeholder has no example value (the graph did not come from Dynamo), or a value escaped the tracer.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes: list[Any] = []
    for node in placeholders:
        value = node.meta.get("example_value", node.meta.get("val"))
        if value is None:
            raise GraphError(
                f"placeholder {node.name} has no example value; retrace expects the graph that Dynamo hands to a "
                "backend (a torch.export program needs no retrace)"
            )
        fakes.append(value)
    mode = next((v.fake_mode for v in fakes if isinstance(v, _torch.FakeTensor)), None)
    traced = _torch.trace_pre_dispatch(lambda *args: Retracer(gm).run(*args), fakes, mode)
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, str(node.target), None), _torch.FakeTensor):
            raise GraphError(
                f"{node.target} was computed out of the tracer's sight and would be baked in without its values; "
                "this graph is not supported"
            )
    _copy_placeholder_meta(placeholders, traced)
    traced.meta.update(gm.meta)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        # A traced module may hold constants as attributes; compile_fx wants a source for each of them.
        known = dict(sources)
        for name, _ in [*traced.named_parameters(), *traced.named_buffers()]:
            known.setdefault(name, _torch.ConstantSource(name))
        object.__setattr__(traced, "_param_name_to_source", known)
    return traced


def _copy_placeholder_meta(old: list[fx.Node], traced: fx.GraphModule) -> None:
    new = traced.graph.find_nodes(op="placeholder")
    if len(new) != len(old):
        raise GraphError(f"retracing changed the number of inputs from {len(old)} to {len(new)}")
    for before, after in zip(old, new, strict=True):
        for key in _PLACEHOLDER_META:
            if key in before.meta:
                after.meta[key] = before.meta[key]
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source  # type: ignore[attr-defined]


def parameter_inputs(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Map the names of the placeholders that carry module parameters and buffers to the real tensors."""
    found: dict[str, torch.Tensor] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = _torch.dynamo_value(node)
        if isinstance(value, torch.nn.Parameter) or (
            isinstance(value, torch.Tensor)
            and (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
        ):
            found[node.name] = value
    return found


def stored_tensors(model: torch.nn.Module) -> dict[int, str]:
    """Map the id of each parameter and each buffer that is saved to its (first) name.

    A permutation may go into these only. A buffer that is not saved (`persistent=False`) is a table that the model may
    compute anew, as PixArt and DiT do with their position embedding at another resolution: it must stay as it is, and
    then so must the channels that it meets.
    """
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(id(tensor), name)
    return names
