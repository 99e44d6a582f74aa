"""The result of `pq_fx.inspect`: one row a linear, shares by treatment, and tables for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from pq_fx.config import QuantConfig
from pq_fx.fitting_table import Column, FittingTable

TREATMENTS = ("quantize", "weight_only", "leave")
ABSORBS = ("fold", "stream", "norm", "quantize")
INSPECTION_VERSION = 1
GIB = 2**30


@dataclass(frozen=True)
class LinearInspection:
    """One linear (or convolution) that the graph shows.

    `treatment` is "quantize" (weights and activations), "weight_only" or "leave" (16 bits, `skip_reason` says why).
    `region` and `point` name what it shares a permutation and a quantized input with; `absorb` says where a
    permutation of its input would go. `flops` are those of the one call that was looked at; `in_block` tells whether
    it lies in a repeated block (an nn.ModuleList) of the model.
    """

    fqn: str
    in_features: int
    out_features: int
    treatment: str
    format: str | None
    activation_format: str | None
    region: str | None
    point: str | None
    absorb: str | None
    flops: int
    parameters: int
    in_block: bool
    skip_reason: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What quantizing a model would do. Print it, or look at `linears` and `to_dict()`.

    `float_bytes` and `quantized_bytes` count all parameters, as they are and as they would be; `graph_breaks` maps
    the reasons of Dynamo's graph breaks to how often they occurred.
    """

    model: str
    linears: tuple[LinearInspection, ...]
    config: QuantConfig
    parameters: int
    regions: int
    attention_flops: int
    float_bytes: int
    quantized_bytes: int
    graphs: int = 1
    graph_breaks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def gemm_flops(self) -> int:
        """FLOPs of all products with parameters."""
        return sum(r.flops for r in self.linears)

    @property
    def block_share(self) -> float:
        """Share of the repeated blocks' GEMM FLOPs that are done on quantized weights and activations.

        A model without an nn.ModuleList counts as one block.
        """
        inside = [r for r in self.linears if r.in_block] or list(self.linears)
        return _share(inside, "quantize", lambda r: r.flops, sum(r.flops for r in inside))

    def flop_share(self, treatment: str) -> float:
        """Share of all GEMM FLOPs with this treatment."""
        return _share(self.linears, treatment, lambda r: r.flops, self.gemm_flops)

    def parameter_share(self, treatment: str) -> float:
        """Share of the model's parameters with this treatment; "leave" includes those of no linear."""
        if treatment == "leave":
            return 1 - self.parameter_share("quantize") - self.parameter_share("weight_only")
        return _share(self.linears, treatment, lambda r: r.parameters, self.parameters)

    @property
    def absorbs(self) -> dict[str, int]:
        """How many quantized inputs would take their permutation where: fold, stream, norm, quantize."""
        points = {r.point: r.absorb for r in self.linears if r.treatment == "quantize"}
        counts = Counter(points.values())
        return {name: counts[name] for name in ABSORBS}

    @property
    def skips(self) -> dict[str, int]:
        """Reasons why linears stay in 16 bits, with how many."""
        return dict(Counter(r.skip_reason for r in self.linears if r.skip_reason).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the summary, then every linear."""
        return {
            "inspection_version": INSPECTION_VERSION,
            "model": self.model,
            "config": self.config.to_dict(),
            **self.summary(),
            "linears": [asdict(row) for row in self.linears],
        }

    def summary(self) -> dict[str, Any]:
        """The figures of the whole model; shares are rounded to 1e-6."""
        return {
            "block_gemm_flop_share": round(self.block_share, 6),
            "gemm_flops": self.gemm_flops,
            "attention_flops": self.attention_flops,
            "flop_share": {t: round(self.flop_share(t), 6) for t in TREATMENTS},
            "parameters": self.parameters,
            "parameter_share": {t: round(self.parameter_share(t), 6) for t in TREATMENTS},
            "linears_by_treatment": {
                t: sum(r.treatment == t for r in self.linears) for t in TREATMENTS
            },
            "regions": self.regions,
            "absorb": self.absorbs,
            "float_bytes": self.float_bytes,
            "quantized_bytes": self.quantized_bytes,
            "graphs": self.graphs,
            "graph_breaks": self.graph_breaks,
            "skips": self.skips,
            "seconds": round(self.seconds, 2),
        }

    def __rich__(self) -> RenderableType:
        kept = [r for r in self.linears if r.treatment != "leave"]
        left = [r for r in self.linears if r.treatment == "leave"]
        parts: list[RenderableType] = []
        if kept:
            parts.append(self._table("Quantized", kept))
        if left:
            parts.append(self._table("Left in 16 bits", left))
        return Group(*parts, Text(self._lines()))

    def __str__(self) -> str:
        console = Console(width=160, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def _lines(self) -> str:
        flops, params = (
            ", ".join(f"{name} {100 * share(key):.2f} %" for key, name in _NAMES.items())
            for share in (self.flop_share, self.parameter_share)
        )
        places = ", ".join(f"{name} {n}" for name, n in self.absorbs.items())
        lines = [
            f"{self.model}: {100 * self.block_share:.2f} % of the blocks' GEMM FLOPs in "
            f"{self.config.weight.key} x {self.config.activation.key if self.config.activation else '16 bit'}",
            f"GEMM FLOPs ({self.gemm_flops / 1e12:.3g} T a call; attention {self.attention_flops / 1e12:.3g} T): "
            f"{flops}",
            f"parameters ({self.parameters / 1e9:.3g} B): {params}",
            f"{self.regions} regions; permutations of quantized inputs would go to: {places}",
            f"memory of parameters: {self.float_bytes / GIB:.2f} GiB -> {self.quantized_bytes / GIB:.2f} GiB",
        ]
        if self.graph_breaks:
            reasons = "; ".join(f"{_short(r)} (x{n})" for r, n in self.graph_breaks.items())
            lines.append(
                f"{self.graphs} graphs: Dynamo breaks the graph, and regions end at a break: {reasons}"
            )
        return "\n".join(lines)

    def _table(self, title: str, rows: Iterable[LinearInspection]) -> FittingTable:
        """One line for each kind of linear: numbers in names are replaced by `*`."""
        kinds: dict[tuple[Any, ...], list[LinearInspection]] = {}
        for r in rows:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", r.fqn)
            key = (
                name,
                r.in_features,
                r.out_features,
                r.format,
                r.activation_format,
                r.absorb,
                r.skip_reason,
            )
            kinds.setdefault(key, []).append(r)
        columns = [
            Column("linear", [key[0] for key in kinds], folds=True),
            Column("number", [str(len(members)) for members in kinds.values()], 3, right=True),
            Column("in x out", [f"{key[1]} x {key[2]}" for key in kinds], 2, right=True),
        ]
        if title == "Quantized":
            columns += [
                Column("weight", [key[3] or "" for key in kinds], 1),
                Column("input", [key[4] or "16 bit" for key in kinds], 1),
                Column("absorb", [key[5] or "" for key in kinds], 4),
            ]
        else:
            columns.append(Column("reason", [key[6] or "" for key in kinds], folds=True))
        for name, size, whole in (
            ("FLOPs", "flops", self.gemm_flops),
            ("parameters", "parameters", self.parameters),
        ):
            shares = [sum(getattr(r, size) for r in members) for members in kinds.values()]
            cells = [f"{100 * share / max(whole, 1):.2f} %" for share in shares]
            columns.append(Column(name, cells, 0 if name == "FLOPs" else 5, right=True))
        return FittingTable(title, columns)


_NAMES = {"quantize": "quantized", "weight_only": "weights only", "leave": "16 bits"}


def _share(
    rows: Iterable[LinearInspection],
    treatment: str,
    size: Callable[[LinearInspection], int],
    whole: int,
) -> float:
    return sum(size(r) for r in rows if r.treatment == treatment) / whole if whole else 0.0


def _short(reason: str) -> str:
    line = reason.strip().splitlines()[0] if reason.strip() else reason
    return line[:100]
