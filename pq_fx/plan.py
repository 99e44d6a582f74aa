"""The plan of a model: its regions and linears by module name, joined over all graphs that calibration met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pq_fx.passes.regions import FoldAxis, Point, Region, RegionMap
from pq_fx.passes.scales import scale_params


@dataclass(frozen=True)
class LinearFact:
    """What a graph showed about one linear; `fqn` is the module's name."""

    fqn: str
    in_features: int
    out_features: int
    treatment: str
    reason: str


@dataclass
class Plan:
    """Regions and linears in terms of parameter names (`blocks.0.attn.to_q.weight`)."""

    regions: dict[str, Region] = field(default_factory=dict)
    linears: dict[str, LinearFact] = field(default_factory=dict)
    # By the point's weights: parameters that take over a scale of its channels (passes/scales.py).
    scale_params: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _graphs: list[tuple[frozenset[str], dict[str, Region]]] = field(default_factory=list)

    def add(
        self, found: RegionMap, names: Mapping[str, str], params: frozenset[str]
    ) -> dict[str, str]:
        """Take in one graph's regions; `names` maps its placeholders to parameter names.

        Returns the graph's point names -> parameter names. Two graphs that disagree about a region (a parameter is
        used differently in each) take away its freedom to fold; each point can still gather.
        """
        regions = {names[r.name]: rename_region(r, names) for r in found.regions}
        for name, region in regions.items():
            known = self.regions.get(name)
            self.regions[name] = (
                region
                if known is None or _same(known, region)
                else _unfold(region, "graphs disagree")
            )
        for weight, linear in found.linears.items():
            fqn = names.get(weight, weight).removesuffix(".weight")
            self.linears.setdefault(
                fqn,
                LinearFact(
                    fqn, linear.in_features, linear.out_features, linear.treatment, linear.reason
                ),
            )
        self._add_scale_params(found, names)
        self._graphs.append((params, regions))
        self._check_foreign_use()
        return {p.name: names[p.name] for r in found.regions for p in r.points}

    def _add_scale_params(self, found: RegionMap, names: Mapping[str, str]) -> None:
        for region in found.regions:
            for point in region.points:
                readers = [found.linears[n].node for n in point.linears]
                params = scale_params(found.sources[point.name], readers, names)
                own = tuple(names[p] for p in params)
                # Graphs that disagree leave an explicit multiplication, which is always right.
                known = self.scale_params.setdefault(names[point.name], own)
                if known != own:
                    self.scale_params[names[point.name]] = ()

    def _check_foreign_use(self) -> None:
        """A region may fold only where every graph that reads its parameters shows the same region."""
        for name, region in self.regions.items():
            if not region.axes:
                continue
            touched = {a.param for a in region.axes}
            for params, regions in self._graphs:
                if touched & params and (name not in regions or not _same(regions[name], region)):
                    self.regions[name] = _unfold(
                        region, "another graph uses its parameters otherwise"
                    )
                    break


def rename_region(region: Region, names: Mapping[str, str]) -> Region:
    """The same region under other parameter names; `names` must hold every one of its own."""

    def point(p: Point) -> Point:
        return replace(p, name=names[p.name], linears=tuple(names[n] for n in p.linears))

    return replace(
        region,
        name=names[region.name],
        points=tuple(point(p) for p in region.points),
        columns={names[n]: c for n, c in region.columns.items()},
        axes=tuple(FoldAxis(names[a.param], a.axis, a.channels) for a in region.axes),
    )


def _same(a: Region, b: Region) -> bool:
    return (
        a.points == b.points
        and np.array_equal(a.blocks, b.blocks)
        and {(x.param, x.axis): x.channels.tobytes() for x in a.axes}
        == {(x.param, x.axis): x.channels.tobytes() for x in b.axes}
    )


def _unfold(region: Region, reason: str) -> Region:
    """The region with nothing left to fold."""
    return replace(
        region, blocks=np.full_like(region.blocks, -1), axes=(), reasons=(*region.reasons, reason)
    )
