"""What must hold after every pass; a graph that breaks it is an error, never a quiet wrong result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from pq_fx.errors import GraphError
from pq_fx.kernels.carriers import channels_carried
from pq_fx.kernels.formats import Format
from pq_fx.passes.channels import Propagation, propagate
from pq_fx.passes.fold import axis_index
from pq_fx.passes.nodes import tensor_meta
from pq_fx.passes.regions import Region

pq = torch.ops.pq


def verify_graph(gm: fx.GraphModule) -> None:
    """Check structure, metadata, and that packed weights agree with their scales and inputs.

    Raises GraphError naming the node, what was found and what was expected.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise GraphError(f"the rewritten graph is not well formed: {error}") from error
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if "val" not in node.meta and (schema is None or schema.returns):
            raise GraphError(f"{node.name} ({node.target}) lost its meta['val']")
        if node.target is pq.linear.default:
            _check_linear(node, *(node.args[i] for i in (0, 3, 4, 5, 7)))
        elif node.target is pq.linears.default:
            for weight, scale in zip(node.args[4], node.args[5], strict=True):  # type: ignore[arg-type]
                _check_linear(node, node.args[0], node.args[3], weight, scale, node.args[7])
        elif node.target is pq.linear_weight_only.default:
            _check_linear(node, node.args[0], None, *(node.args[i] for i in (1, 2, 4)))


def _check_linear(
    node: fx.Node, x: Any, activation: Any, weight: Any, scale: Any, key: Any
) -> None:
    fmt = Format.parse(key)
    data, packed, scales = tensor_meta(x), tensor_meta(weight), tensor_meta(scale)
    if data is None or packed is None or scales is None:
        raise GraphError(f"{node.name}: its input, packed weight or weight scale is missing")
    channels = int(channels_carried(data))
    wanted = (fmt.packed_bytes(channels), fmt.groups(channels))
    found = (int(packed.shape[-1]), int(scales.shape[-1]))
    if wanted != found:
        raise GraphError(
            f"{node.name}: {channels} channels in {key} need {wanted[0]} bytes and {wanted[1]} scales a row, found "
            f"{found[0]} and {found[1]}"
        )
    if activation is not None:
        Format.parse(activation).check_channels(channels)


# Parameters by placeholder name, or their shapes where the tensors are gone.
Shapes = Mapping[str, torch.Tensor | torch.Size]


class _Replay(Propagation):
    """Walks the graph again with the channels in their new places and looks for an equality that no longer holds."""

    def __init__(self, params: Shapes, labels: Mapping[tuple[str, int], np.ndarray]) -> None:
        super().__init__(params)
        self.labels = labels
        self.count = sum(v.size for v in labels.values()) + 1
        self.broken: list[str] = []
        self.where = ""

    def axis(self, param: str, axis: int) -> np.ndarray:
        super().axis(param, axis)
        return self.labels[param, axis]

    def fresh(self, size: int) -> np.ndarray:
        return -1 - super().fresh(size)

    def equal(self, a: np.ndarray, b: np.ndarray) -> None:
        a, b = np.broadcast_arrays(a, b)
        apart = (
            (a != b) & (a >= 0) & (b >= 0)
        )  # negative: a constant's coordinate, which never moves
        if apart.any():
            self.broken.append(f"{int(apart.sum())} of {a.size} channels do not meet")


def verify_folds(
    gm: fx.GraphModule,
    params: Shapes,
    regions: list[Region],
    perms: Mapping[str, np.ndarray],
) -> None:
    """Check that folding `perms` (region name -> permutation) leaves every equality of the graph intact.

    Independent of how regions were found: the channel classes are put in their new places on every parameter axis and
    the whole graph is walked again. Raises GraphError when any operation would meet unlike channels.
    """
    channels = propagate(gm, params)
    labels = {key: channels.of[space.atoms] for key, space in channels.axes.items()}
    for region in regions:
        perm = perms.get(region.name)
        if perm is None:
            continue
        for axis in region.axes:
            labels[axis.param, axis.axis] = labels[axis.param, axis.axis][
                axis_index(axis.channels, perm)
            ]
    replay = _Replay(params, labels)
    from pq_fx.passes.rules import apply_rule

    for node in gm.graph.nodes:
        if node.op == "call_function":
            before = len(replay.broken)
            replay.values[node] = apply_rule(replay, node)
            if len(replay.broken) > before:
                raise GraphError(
                    f"a folded permutation is not closed at {node.name}: {replay.broken[-1]}"
                )
