"""Channel spaces: which channels of which parameters must move together.

Every axis of every parameter is a space of channels, and every operation of the graph equates, separates or pins
channels. `linear(x, W, b)` equates x's last axis with W's columns and starts a new space with W's rows; an
elementwise operation equates its operands; a chunk tells its pieces apart; attention tells heads apart; a graph
output pins what it shows. What remains is the symmetry group of the network: a permutation that moves whole classes
of equated channels, among classes that nothing tells apart, changes no result. Regions (regions.py) are read off it.

    W1 = rows 0..7    h = linear(x, W1)          classes: {W1.rows[i], W2.cols[i]} for i in 0..7, all alike
    y = linear(gelu(h), W2)                      -> W1[p], b1[p], W2[:, p] is the same network for any permutation p

A value's channels are kept as an int64 array of atom numbers that has the value's rank, the true size on axes that
carry channels and size 1 on axes that do not (batch, tokens). So nothing depends on sequence lengths, and layout
operations are done by doing them to the labels. This file holds the algebra; rules.py says what each operation does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from pq_fx.errors import GraphError

Labels = np.ndarray
NOTHING = np.zeros(0, np.int64)


@dataclass
class Axis:
    """One axis of one parameter: `first` is its first atom, `size` how many there are."""

    param: str
    axis: int
    first: int
    size: int

    @property
    def atoms(self) -> Labels:
        """The axis's atoms in order, int64 [size]."""
        return np.arange(self.first, self.first + self.size)


class Tag(NamedTuple):
    """What tells channels apart: atoms, the coordinate of each, and the node that does it."""

    labels: Labels
    coordinate: np.ndarray
    node: str


@dataclass
class Channels:
    """What propagation found; atoms are numbered 0..atoms-1 and `of` maps an atom to its class.

    `kind[c]` is equal for classes that may be exchanged; `pinned[c]` is the reason why class c may not move, as an
    index into `reasons`, or -1; `normed[c]` says that a norm sees class c.
    """

    axes: dict[tuple[str, int], Axis]
    of: Labels
    kind: np.ndarray
    pinned: np.ndarray
    normed: np.ndarray
    reasons: list[str]
    inputs: dict[fx.Node, Labels] = field(default_factory=dict)
    tags: list[Tag] = field(default_factory=list)

    def classes(self, param: str, axis: int) -> Labels:
        """The classes of a parameter's axis in order, int64 [size]."""
        return self.of[self.axes[param, axis].atoms]

    def separators(self, classes: np.ndarray) -> list[str]:
        """The nodes that tell some of these classes apart, in the order of the graph."""
        wanted = np.zeros(self.kind.size, bool)
        wanted[classes] = True
        found: dict[str, None] = {}
        for tag in self.tags:
            here = tag.coordinate[wanted[self.of[tag.labels]]]
            if here.size and here.min() != here.max():
                found.setdefault(tag.node)
        return list(found)


class Propagation:
    """Walks a graph once and collects equalities, distinctions and pins; `finish` turns them into classes."""

    def __init__(self, params: Mapping[str, torch.Tensor | torch.Size]) -> None:
        self.shapes = {
            k: tuple(v.shape if isinstance(v, torch.Tensor) else v) for k, v in params.items()
        }
        self.axes: dict[tuple[str, int], Axis] = {}
        self.values: dict[fx.Node, Any] = {}
        self.inputs: dict[fx.Node, Labels] = {}
        self._count = 0
        self._equal: list[tuple[Labels, Labels]] = []
        self._pins: list[tuple[Labels, int]] = []
        self._tags: list[Tag] = []
        self._normed: list[Labels] = []
        self._reasons: dict[str, int] = {}
        self._late_pins: list[tuple[str, str]] = []
        self.node = ""  # the node whose rule is at work

    # atoms ------------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Labels:
        """New atoms that belong to no parameter (a constant's coordinates), int64 [size]."""
        self._count += size
        return np.arange(self._count - size, self._count)

    def axis(self, param: str, axis: int) -> Labels:
        """The atoms of a parameter's axis; the same ones each time, so that tied weights stay tied."""
        key = (param, axis)
        if key not in self.axes:
            size = int(self.shapes[param][axis])
            self.axes[key] = Axis(
                param, axis, int(self.fresh(size)[0]) if size else self._count, size
            )
        return self.axes[key].atoms

    def param_value(self, param: str) -> Labels | None:
        """The labels of a parameter read as an ordinary operand: channels on its last axis."""
        shape = self.shapes[param]
        if not shape:
            return None
        # Its other axes may have moved with another reader; a plain read cannot follow that.
        self._late_pins.append((param, f"parameter {param} is also read outside a linear"))
        return self.axis(param, len(shape) - 1).reshape([1] * (len(shape) - 1) + [-1])

    # facts ------------------------------------------------------------------------------------------------

    def equal(self, a: Labels, b: Labels) -> None:
        """Channels at the same (broadcast) coordinate move together."""
        a, b = np.broadcast_arrays(a, b)
        if a is not b:
            self._equal.append((a.ravel(), b.ravel()))

    def pin(self, labels: Labels | None, reason: str) -> None:
        """These channels may not move at all."""
        if labels is not None and labels.size > 1:
            self._pins.append(
                (labels.ravel(), self._reasons.setdefault(reason, len(self._reasons)))
            )

    def tell_apart(self, labels: Labels | None, axes: Iterable[int]) -> None:
        """Channels at different coordinates along `axes` may not be exchanged."""
        if labels is None:
            return
        kept = [a % labels.ndim for a in axes]
        shape = [n if i in kept else 1 for i, n in enumerate(labels.shape)]
        if np.prod(shape) > 1:
            coordinate = np.arange(np.prod(shape)).reshape(shape)
            self.tag(labels, np.broadcast_to(coordinate, labels.shape))

    def tag(self, labels: Labels, coordinate: np.ndarray) -> None:
        """Channels with different coordinates (int64, of the labels' shape) may not be exchanged."""
        self._tags.append(Tag(labels.ravel(), coordinate.ravel(), self.node))

    def pieces(self, labels: Labels, axis: int, sizes: list[int]) -> None:
        """Channels in different pieces along `axis` may not be exchanged."""
        piece = np.repeat(np.arange(len(sizes)), sizes)
        shape = [1] * labels.ndim
        shape[axis] = -1
        self.tag(labels, np.broadcast_to(piece.reshape(shape), labels.shape))

    def saw_norm(self, labels: Labels | None) -> None:
        """A norm (or another reduction over all channels) sees these channels."""
        if labels is not None:
            self._normed.append(labels.ravel())

    # result -----------------------------------------------------------------------------------------------

    def finish(self) -> Channels:
        """Join what was equated and number the classes."""
        for param, reason in self._late_pins:
            for (name, axis), space in self.axes.items():
                if name == param and axis != len(self.shapes[param]) - 1:
                    self.pin(space.atoms, reason)
        count = self._count
        a = np.concatenate([x for x, _ in self._equal] or [NOTHING])
        b = np.concatenate([y for _, y in self._equal] or [NOTHING])
        n, of = components(a, b, count)

        kind = np.zeros(n, np.uint64)
        for i, (_, space) in enumerate(sorted(self.axes.items())):
            own = of[space.first : space.first + space.size]
            np.add.at(kind, own, _mix(np.uint64(2 * i + 1), np.zeros(1, np.uint64)))
        for i, tag in enumerate(self._tags):
            mixed = _mix(np.uint64(2 * i + 2), tag.coordinate.astype(np.uint64))
            np.add.at(kind, of[tag.labels], mixed)
        pinned = np.full(n, -1, np.int64)
        for labels, reason_index in reversed(self._pins):
            pinned[of[labels]] = reason_index
        normed = np.zeros(n, bool)
        for labels in self._normed:
            normed[of[labels]] = True
        return Channels(
            self.axes, of, kind, pinned, normed, list(self._reasons), self.inputs, self._tags
        )


def components(a: np.ndarray, b: np.ndarray, count: int) -> tuple[int, np.ndarray]:
    """Join atoms a[i] and b[i]; returns the number of classes and the class of each atom, int64 [count].

    Each round hooks the larger root of every pair that is still apart to the smaller one and shortens all paths, so
    that long chains (a residual stream) take few rounds (Shiloach and Vishkin, 1982).
    """
    root = np.arange(count)
    while a.size:
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while True:
            shorter = root[root]
            if np.array_equal(shorter, root):
                break
            root = shorter
    first = root == np.arange(count)
    number = np.cumsum(first) - 1
    return int(first.sum()), number[root]


def _mix(source: np.uint64, coordinate: np.ndarray) -> np.ndarray:
    """Hash (source, coordinate) to 64 bits, splitmix64; sums of these tell multisets of facts apart."""
    with np.errstate(over="ignore"):
        z = coordinate * np.uint64(0x9E3779B97F4A7C15) + source * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def propagate(gm: fx.GraphModule, params: Mapping[str, torch.Tensor | torch.Size]) -> Channels:
    """Find the channel classes of a pre-dispatch ATen graph.

    `params` maps the names of parameter placeholders (or get_attr nodes) to tensors or shapes. Raises GraphError
    where a node lacks `meta["val"]`. An operation that has no rule pins its inputs, with a reason; nothing is
    assumed about it.
    """
    from pq_fx.passes.rules import apply_rule

    state = Propagation(params)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            state.values[node] = None
        elif node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if "val" not in node.meta and (schema is None or schema.returns):
                raise GraphError(
                    f"node {node.name} has no meta['val']; run retrace or torch.export first"
                )
            state.node = node.name
            state.values[node] = apply_rule(state, node)
        elif node.op == "output":
            for value in node.all_input_nodes:
                for labels in _leaves(read(state, value)):
                    state.pin(labels, f"it is visible in the graph's output ({value.name})")
        else:
            raise GraphError(f"{node.op} {node.target} is not pre-dispatch ATen; run retrace first")
    return state.finish()


def read(state: Propagation, node: fx.Node) -> Any:
    """The labels of a node's value: an array, None (no channels), or a list of these."""
    if node.name in state.shapes and node.op in ("placeholder", "get_attr"):
        return state.param_value(node.name)
    return state.values.get(node)


def _leaves(value: Any) -> Iterable[Labels]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
