"""Regions: which linears must share a permutation, and where it can be absorbed.

    v = linear(h, Wv)              region {out}: channels = rows of Wv, exchangeable within a head
    a = attention(q, k, v)             absorb: fold = Wv[p], bv[p], Wout[:, p]
    y = linear(a, Wout)

    h = layer_norm(x) * (1 + s) + t    point h, read by q, k, v and the MLP: any order
    q, k, v = linear(h, W...)          absorb: norm = the gather inside the fused norm kernel, Wq[:, p], Wk[:, p], ...

A point is a tensor that is quantized once, for all linears that read it. A region is a set of points that hold the same
channels (both streams of a joint attention), so that folding must treat them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from pq_fx.passes.channels import Channels, propagate
from pq_fx.passes.nodes import source
from pq_fx.passes.patterns import match_norm
from pq_fx.passes.select import Linear, select


@dataclass(frozen=True)
class Point:
    """A tensor that is quantized once. `absorb` says where a gather of it would happen: "norm" or "quantize"."""

    name: str
    linears: tuple[str, ...]  # names of weight parameters
    channels: int
    absorb: str
    one_row: bool


@dataclass(frozen=True)
class FoldAxis:
    """An axis of a parameter that follows a region: `channels[j]` is the region's channel at position j, or -1."""

    param: str
    axis: int
    channels: np.ndarray


@dataclass(frozen=True)
class Region:
    """Points that share their channels.

    `blocks[c]` numbers the sets of exchangeable channels, -1 for a channel that may not move by folding.
    `columns[point][k]` is the channel that column k of the point's linears holds.
    `reasons` says, for what may not fold, why. `stream` says that norms see these channels and several points
    read them: a residual stream, for which one permutation is a compromise between its readers.
    """

    name: str
    points: tuple[Point, ...]
    blocks: np.ndarray
    columns: dict[str, np.ndarray]
    axes: tuple[FoldAxis, ...] = ()
    reasons: tuple[str, ...] = ()
    stream: bool = False

    @property
    def fold_name(self) -> str:
        """What absorbs a permutation that costs nothing: "stream" or "fold"."""
        return "stream" if self.stream else "fold"

    @property
    def foldable(self) -> bool:
        """Whether any channel may move by folding alone."""
        return bool((self.blocks >= 0).any())


@dataclass
class RegionMap:
    """All linears and regions of one graph."""

    linears: dict[str, Linear]
    regions: list[Region] = field(default_factory=list)
    sources: dict[str, fx.Node] = field(
        default_factory=dict
    )  # point name -> the node that is quantized


def find_regions(
    gm: fx.GraphModule,
    params: Mapping[str, torch.Tensor],
    hidden: Mapping[str, bool] | None = None,
    ends: bool = True,
) -> RegionMap:
    """Propagate channels through `gm` and group its linears into points and regions.

    `params` maps parameter placeholders to their tensors; `hidden` and `ends` are `select`'s. The names in the result
    are placeholder names.
    """
    channels = propagate(gm, params)
    linears = select(gm, set(params), hidden, ends)
    by_weight: dict[str, Linear] = {}
    readers: dict[fx.Node, list[Linear]] = {}
    for linear in linears:
        if linear.weight in by_weight:
            # One parameter, two places: both inputs would need one permutation and one scale. Rare (DiT's embedder).
            linear = _impossible(linear, "its weight is used by two linears")
        by_weight[linear.weight] = linear
    for linear in by_weight.values():
        if linear.treatment != "impossible":
            readers.setdefault(source(linear.node.args[0]), []).append(linear)  # type: ignore[arg-type]
    found = RegionMap(by_weight)
    points: list[Point] = []
    for node, group in readers.items():
        for treatment in ("quantize", "weight_only", "leave"):
            members = [g for g in group if g.treatment == treatment]
            if not members:
                continue
            one_row = treatment == "weight_only"
            absorb = "norm" if match_norm(node) is not None else "quantize"
            point = Point(
                members[0].weight,
                tuple(m.weight for m in members),
                members[0].in_features,
                absorb,
                one_row,
            )
            points.append(point)
            found.sources[point.name] = node
    found.regions = _group(points, channels, by_weight)
    return found


def _impossible(linear: Linear, reason: str) -> Linear:
    return replace(linear, treatment="impossible", reason=reason)


def _group(points: list[Point], channels: Channels, linears: dict[str, Linear]) -> list[Region]:
    """Join points that hold the same movable channels into regions."""
    columns = {p.name: channels.inputs[linears[p.name].node] for p in points}
    classes = {name: channels.of[atoms] for name, atoms in columns.items()}
    movable = _movable(points, classes, channels)
    parent = list(range(len(points)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    holder: dict[int, int] = {}
    for i, p in enumerate(points):
        for k in np.unique(channels.kind[classes[p.name][movable[classes[p.name]]]]):
            parent[root(i)] = root(holder.setdefault(int(k), i))
    groups: dict[int, list[Point]] = {}
    for i, p in enumerate(points):
        groups.setdefault(root(i), []).append(p)

    region_of = np.full(channels.kind.size, -1, np.int64)
    channel_of = np.full(channels.kind.size, -1, np.int64)
    drafts: list[Region] = []
    for r, members in enumerate(groups.values()):
        held = np.concatenate([classes[p.name] for p in members])
        if not movable[held].any():
            k = members[0].channels
            where = {members[0].name: np.arange(k)}
            stay = np.full(k, -1)
            drafts.append(_region(members, stay, where, reasons=_reasons(held, channels)))
            continue
        _, first = np.unique(held, return_index=True)
        order = held[np.sort(first)]
        channel_of[order] = np.arange(order.size)
        region_of[order[movable[order]]] = r
        blocks = np.full(order.size, -1, np.int64)
        _, blocks[movable[order]] = np.unique(
            channels.kind[order[movable[order]]], return_inverse=True
        )
        where = {p.name: channel_of[classes[p.name]].copy() for p in members}
        stream = len(members) > 1 and bool(channels.normed[order[movable[order]]].any())
        reasons = _pins(held, channels)
        drafts.append(_region(members, blocks, where, reasons=reasons, stream=stream))

    axes: dict[int, list[FoldAxis]] = {}
    for (param, axis), space in channels.axes.items():
        own = channels.of[space.atoms]
        for r in np.unique(region_of[own]):
            if r >= 0:
                here = np.where(region_of[own] == r, channel_of[own], -1)
                axes.setdefault(int(r), []).append(FoldAxis(param, axis, here))
    return [replace(draft, axes=tuple(axes.get(r, ()))) for r, draft in enumerate(drafts)]


def _region(
    members: list[Point], blocks: np.ndarray, columns: dict[str, np.ndarray], **rest: Any
) -> Region:
    return Region(members[0].name, tuple(members), blocks, columns, **rest)


def _movable(points: list[Point], classes: dict[str, np.ndarray], channels: Channels) -> np.ndarray:
    """Which classes may be moved by folding: unpinned, with a like class to change places with."""
    held = np.zeros(channels.kind.size, bool)
    for p in points:
        held[classes[p.name]] = True
    movable = np.zeros(channels.kind.size, bool)
    free = np.flatnonzero(held & (channels.pinned < 0))
    _, inverse, counts = np.unique(channels.kind[free], return_inverse=True, return_counts=True)
    movable[free] = (counts > 1)[inverse]
    return movable


def _reasons(held: np.ndarray, channels: Channels) -> tuple[str, ...]:
    """Why these classes stay where they are: what pins them, else what tells them apart."""
    apart = channels.separators(held)[:3] if held.size > 1 else []
    return _pins(held, channels) or tuple(f"{n} tells its channels apart" for n in apart)


def _pins(held: np.ndarray, channels: Channels) -> tuple[str, ...]:
    indices = np.unique(channels.pinned[held])
    return tuple(channels.reasons[i] for i in indices if i >= 0)
