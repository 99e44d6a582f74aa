"""The plan of a model: its regions and linears by module name, joined over all graphs that calibration met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pq_fx.passes.regions import FoldAxis, Point, Region, RegionMap
from pq_fx.passes.scales import Absorber, absorbers


@dataclass(frozen=True)
class LinearFact:
    """What a graph showed about one linear; `fqn` is the module's name."""

    fqn: str
    in_features: int
    out_features: int
    treatment: str
    reason: str


@dataclass(frozen=True)
class GraphFacts:
    """What one graph showed, by parameter names: those it reads, its regions by name, its linears.

    `absorbers` are, by a point's name, what takes over a scale and an offset of its channels (passes/scales.py).
    """

    params: frozenset[str]
    regions: dict[str, Region]
    linears: tuple[LinearFact, ...]
    absorbers: dict[str, tuple[Absorber, ...]]

    def same(self, other: GraphFacts) -> bool:
        """Whether the two say the same; another resolution's graph of a model usually does."""
        return (
            self.params == other.params
            and self.linears == other.linears
            and self.absorbers == other.absorbers
            and self.regions.keys() == other.regions.keys()
            and all(_same(r, other.regions[name]) for name, r in self.regions.items())
        )


@dataclass
class Plan:
    """Regions and linears in terms of parameter names (`blocks.0.attn.to_q.weight`)."""

    regions: dict[str, Region] = field(default_factory=dict)
    linears: dict[str, LinearFact] = field(default_factory=dict)
    absorbers: dict[str, tuple[Absorber, ...]] = field(default_factory=dict)
    graphs: list[GraphFacts] = field(default_factory=list)  # from which the others follow

    def add(
        self, found: RegionMap, names: Mapping[str, str], params: frozenset[str]
    ) -> dict[str, str]:
        """Take in one graph's regions; `names` maps its placeholders to parameter names.

        Returns the graph's point names -> parameter names.
        """
        linears = []
        for weight, linear in found.linears.items():
            fqn = names.get(weight, weight).removesuffix(".weight")
            sizes = (linear.in_features, linear.out_features)
            linears.append(LinearFact(fqn, *sizes, linear.treatment, linear.reason))
        regions = {names[r.name]: rename_region(r, names) for r in found.regions}
        self.take(GraphFacts(params, regions, tuple(linears), _absorbers(found, names)))
        return {p.name: names[p.name] for r in found.regions for p in r.points}

    def take(self, facts: GraphFacts) -> None:
        """Join one graph's facts.

        Two graphs that disagree about a region (a parameter is used differently in each) take away its freedom to
        fold; each point can still gather.
        """
        if any(facts.same(known) for known in self.graphs):
            return
        for name, region in facts.regions.items():
            known = self.regions.get(name)
            self.regions[name] = (
                region
                if known is None or _same(known, region)
                else _unfold(region, "graphs disagree")
            )
        for linear in facts.linears:
            self.linears.setdefault(linear.fqn, linear)
        for point, own in facts.absorbers.items():
            # Graphs that disagree leave an explicit multiplication, which is always right.
            if self.absorbers.setdefault(point, own) != own:
                self.absorbers[point] = ()
        self.graphs.append(facts)
        self._check_foreign_use()

    @classmethod
    def of(cls, graphs: Iterable[GraphFacts]) -> Plan:
        """The plan that these graphs make together, in this order."""
        plan = cls()
        for facts in graphs:
            plan.take(facts)
        return plan

    def copy(self) -> Plan:
        """A plan that further graphs can be added to without changing this one."""
        return Plan(dict(self.regions), dict(self.linears), dict(self.absorbers), list(self.graphs))

    def _check_foreign_use(self) -> None:
        """A region may fold only where every graph that reads its parameters shows the same region."""
        for name, region in self.regions.items():
            if not region.axes:
                continue
            touched = {a.param for a in region.axes}
            for facts in self.graphs:
                theirs = facts.regions.get(name)
                if touched & facts.params and (theirs is None or not _same(theirs, region)):
                    self.regions[name] = _unfold(
                        region, "another graph uses its parameters otherwise"
                    )
                    break


def _absorbers(found: RegionMap, names: Mapping[str, str]) -> dict[str, tuple[Absorber, ...]]:
    result = {}
    for region in found.regions:
        for point in region.points:
            readers = [found.linears[n].node for n in point.linears]
            own = absorbers(found.sources[point.name], readers, names)
            result[names[point.name]] = tuple(replace(a, param=names[a.param]) for a in own)
    return result


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
