"""Running Dynamo's graph for the tracer, with what was traced once written down again instead of traced again.

A transformer repeats the same few hundred calls in all of its blocks, and tracing one of them costs a millisecond of
dispatching. So the ATen operations that a call turned into are remembered by everything that they can depend on: the
function, its constant arguments, and dtype, device, sizes and strides of its tensors. An equal call gets equal
operations at once.

    y.unflatten(-1, (24, 128))      block 0: traced           aten.unflatten.int(y, -1, [24, 128])
    z.unflatten(-1, (24, 128))      block 1: written down     aten.unflatten.int(z, -1, [24, 128])

Traced always: what writes to its arguments, has symbolic sizes, reads constants, or returns anything but tensors. Such
a call may change what others turn into (autocast, grad mode), so that everything is forgotten there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pq_fx.passes import _torch


class _Slot(NamedTuple):
    """Stands for a tensor argument (numbers from 0) or, behind these, an earlier operation's result."""

    number: int


class _Result(NamedTuple):
    """A tensor that looks like `like`, for which operation `number` stands; argument `same` itself, if it is one."""

    like: Tensor
    number: int
    same: int | None


class _Recipe(NamedTuple):
    """The operations that a call turned into, and which of them are its result; `make` gives it its shape."""

    nodes: list[tuple[fx.Node, tuple[Any, ...], dict[str, Any]]]
    results: list[_Result]
    make: Callable[[list[Tensor]], Any]


class _Untold(Exception):
    """An argument that a recipe cannot depend on."""


class Retracer(fx.Interpreter):
    """Runs Dynamo's graph under `_torch.trace_pre_dispatch`; `remember=False` traces every call."""

    def __init__(self, gm: fx.GraphModule, remember: bool = True) -> None:
        super().__init__(gm)
        self.remember = remember
        self.replayed = 0
        self._recipes: dict[Hashable, _Recipe | None] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `target`."""
        if target is _torch.get_data:
            # The tracer does not see Dynamo's call for `x.data`, and what is then written through it would be lost.
            # The same memory without its history is `x.detach()`, which it knows.
            return args[0].detach()
        return self._call(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the method `target`."""
        return self._call(super().call_method, target, args, kwargs)

    def _call(
        self, trace: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors: list[Tensor] = []
        tracer = _torch.proxy_tracer() if self.remember else None
        try:
            key = (target, _describe(args, tensors), _describe(kwargs, tensors))
            inputs = [] if tracer is None else [_torch.traced_node(t, tracer) for t in tensors]
            if tracer is None or None in inputs:
                raise _Untold
            recipe = self._recipes.get(key)
        except (_Untold, TypeError):  # TypeError: a target that cannot be hashed
            return self._forgetting(trace(target, args, kwargs))
        if recipe is not None:
            self.replayed += 1
            return _replay(recipe, tensors, inputs, tracer)
        last = next(iter(reversed(tracer.graph.nodes)))
        result = self._forgetting(trace(target, args, kwargs))
        if key not in self._recipes:
            self._recipes[key] = _record(result, tensors, inputs, last, tracer)
        return result

    def _forgetting(self, result: Any) -> Any:
        if not isinstance(result, (Tensor, tuple, list)):
            self._recipes.clear()
        return result


_CONSTANTS = (float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _describe(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a call depends on in `value`; its tensors are appended to `tensors`. Raises _Untold."""
    if isinstance(value, Tensor):
        sizes, strides, offset = tuple(value.shape), value.stride(), value.storage_offset()
        if type(value) not in _torch.PLAIN or not all(
            type(n) is int for n in (*sizes, *strides, offset)
        ):
            raise _Untold
        first = next((i for i, t in enumerate(tensors) if t is value), len(tensors))
        tensors.append(value)
        return first, sizes, strides, offset, value.dtype, value.device, value.requires_grad
    if isinstance(value, (tuple, list)):
        return type(value), *(_describe(v, tensors) for v in value)
    if isinstance(value, dict):
        return tuple((k, _describe(v, tensors)) for k, v in value.items())
    if isinstance(value, slice):
        return slice, *(_describe(v, tensors) for v in (value.start, value.stop, value.step))
    if type(value) in (int, bool) or value is ... or isinstance(value, _CONSTANTS):
        return type(value), value
    raise _Untold


def _record(
    result: Any, tensors: list[Tensor], inputs: list[fx.Node], last: fx.Node, tracer: Any
) -> _Recipe | None:
    """The recipe of a call that has just been traced; None where it is more than a function of its arguments."""
    numbers = {node: i for i, node in enumerate(inputs)}
    nodes = []
    node = last.next
    while node.op != "root":
        schema = getattr(node.target, "_schema", None)
        plain = node.target is operator.getitem or (schema is not None and not schema.is_mutable)
        if (
            node.op != "call_function"
            or not plain
            or any(a not in numbers for a in node.all_input_nodes)
        ):
            return None
        slot = {n: _Slot(i) for n, i in numbers.items()}
        nodes.append((node, *(fx.map_arg(a, slot.__getitem__) for a in (node.args, node.kwargs))))
        numbers[node] = len(inputs) + len(nodes) - 1
        node = node.next
    leaves = [result] if isinstance(result, Tensor) else result
    if type(leaves) not in (list, tuple) or not all(type(t) in _torch.PLAIN for t in leaves):
        return None
    results = []
    for leaf in leaves:
        number = numbers.get(_torch.traced_node(leaf, tracer))
        if number is None:
            return None
        same = next((i for i, t in enumerate(tensors) if t is leaf), None)
        results.append(_Result(leaf, number, same))
    make = (lambda made: made[0]) if isinstance(result, Tensor) else type(result)
    return _Recipe(nodes, results, make)


def _replay(recipe: _Recipe, tensors: list[Tensor], inputs: list[fx.Node], tracer: Any) -> Any:
    nodes = list(inputs)
    for old, args, kwargs in recipe.nodes:
        packet = getattr(old.target, "overloadpacket", None)
        name = None if packet is None else packet.__name__
        filled = (_fill(args, nodes), _fill(kwargs, nodes))
        new = tracer.create_node("call_function", old.target, *filled, name)
        new.meta.update(
            {k: old.meta[k] for k in ("val", "tensor_meta", "torch_fn") if k in old.meta}
        )
        nodes.append(new)
    made = []
    for like, number, same in recipe.results:
        tensor = _torch.like(like) if same is None else tensors[same]
        _torch.trace_as(tensor, nodes[number], tracer)
        made.append(tensor)
    return recipe.make(made)


def _fill(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, _Slot):
        return nodes[value.number]
    if isinstance(value, (tuple, list)):
        return type(value)(_fill(v, nodes) for v in value)
    if isinstance(value, dict):
        return {k: _fill(v, nodes) for k, v in value.items()}
    return value
