"""Which linears of a model are quantized, with their own settings; the plan cut down to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from pq_fx.config import QuantConfig
from pq_fx.decide import decide
from pq_fx.errors import CalibrationError
from pq_fx.kernels.formats import Format
from pq_fx.passes.regions import Point, Region
from pq_fx.plan import LinearFact, Plan
from pq_fx.report import LayerReport


@dataclass
class Layer:
    """A linear to be quantized: its own settings, and the formats of its weight and its input (None: 16 bits)."""

    fact: LinearFact
    config: QuantConfig
    module: nn.Linear
    one_row: bool
    weight_format: Format
    activation_format: Format | None


def layers_to_quantize(
    model: nn.Module, plan: Plan, config: QuantConfig
) -> tuple[dict[str, Layer], dict[str, LayerReport]]:
    """The linears to quantize, by weight name, and the report rows of the others, by module name."""
    layers: dict[str, Layer] = {}
    rows: dict[str, LayerReport] = {}
    modules = dict(model.named_modules())
    for fqn, fact in plan.linears.items():
        module = modules.get(fqn)
        decision = decide(fact, config, module)
        if decision.config is None:
            rows[fqn] = LayerReport(
                fqn, fact.in_features, fact.out_features, skip_reason=decision.skip_reason
            )
        else:
            assert isinstance(module, nn.Linear) and decision.weight is not None
            layers[fqn + ".weight"] = Layer(
                fact,
                decision.config,
                module,
                fact.treatment == "weight_only",
                decision.weight,
                decision.activation,
            )
    return layers, rows


def restrict(region: Region, layers: dict[str, Layer]) -> Region | None:
    """The region with only the linears that are quantized; a point whose linears differ in format is split."""
    points: list[Point] = []
    columns: dict[str, np.ndarray] = {}
    for point in region.points:
        groups: dict[tuple[str | None, bool], list[str]] = {}
        for name in point.linears:
            if name in layers:
                fmt = layers[name].activation_format
                groups.setdefault((fmt.key if fmt else None, layers[name].one_row), []).append(name)
        for members in groups.values():
            points.append(replace(point, name=members[0], linears=tuple(members)))
            columns[members[0]] = region.columns[point.name]
    if not points:
        return None
    if len(points) > 1 and not region.foldable:
        # Nothing is shared by folding, but one region's columns describe one point only.
        columns = {p.name: np.arange(p.channels) for p in points}
    return replace(region, points=tuple(points), columns=columns)


def origin(plan: Plan, point: Point) -> str:
    """The point that was observed, for a point that may have been split off it."""
    for region in plan.regions.values():
        for candidate in region.points:
            if point.linears[0] in candidate.linears:
                return candidate.name
    raise CalibrationError(f"{point.name} was not observed")
