"""What a quantization did: one row a linear, sums over the model, and a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text
from torch import nn

from pq_fx.config import QuantConfig
from pq_fx.config_values import FULL_RANGE
from pq_fx.errors import ConfigError, PQError
from pq_fx.fitting_table import Column, FittingTable
from pq_fx.methods import parts_between, parts_on

REPORT_VERSION = 1
_ATTRIBUTE = "quantization_report"


class ReportError(PQError, ValueError):
    """A stored report is of another version or lacks fields."""


@dataclass(frozen=True)
class LayerReport:
    """One linear of the model.

    Attributes:
        fqn: its fully qualified name, e.g. "transformer_blocks.0.attn.to_q".
        in_features, out_features: its K and N.
        format: key of its weight format, e.g. "int4:64:bf16"; None when it was left in float.
        activation_format: key of its input's format; None when its input stays in 16 bits.
        region: name of the region whose permutation it shares; None when it has none.
        absorb: where the permutation of its input goes: "fold", "norm" or "quantize"; "none" or
            None without one.
        alpha: exponent of the chosen sort; None when the order was kept.
        rotation: size of the Hadamard blocks of its input; 0 without.
        error_before: relative squared output error ``|X W^T - Q(X) Q(W)^T|^2 / |X W^T|^2`` on
            held-out calibration rows in the original order, without rotation; None if not measured.
        error_after: the same as it was converted.
        accepted: whether the permutation or rotation was kept; None where none was tried.
        clip: constant that its input's scales are made from, times the largest magnitude.
        smooth: "folded" or "multiply" (an operation in the graph) where its input was smoothed.
        low_rank: rank of the 16-bit branch beside its weight.
        skip_reason: why it was left in float; None when it was quantized.
    """

    fqn: str
    in_features: int
    out_features: int
    format: str | None = None
    activation_format: str | None = None
    region: str | None = None
    absorb: str | None = None
    alpha: float | None = None
    rotation: int = 0
    error_before: float | None = None
    error_after: float | None = None
    accepted: bool | None = None
    clip: float = 1.0
    smooth: str | None = None
    low_rank: int = 0
    skip_reason: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the layer was quantized."""
        return self.skip_reason is None


@dataclass(frozen=True)
class Report:
    """The outcome of `Quantizer.convert`. Print it, or look at `layers`.

    Attributes:
        layers: one row a linear, in the model's order, those that were left alone among them.
        config: the settings it was made with.
        seconds: time that choosing, folding and packing took, without calibration.
        weight_bytes: bytes of the linears' weights now: packed codes, scales, and the float weights
            of skipped layers.
        float_weight_bytes: bytes of the same weights before.
        calibration_calls: calls of the model that calibration saw; 0 when unknown.
        device: device type it ran on, e.g. "cpu".
    """

    layers: tuple[LayerReport, ...]
    config: QuantConfig
    seconds: float = 0.0
    weight_bytes: int = 0
    float_weight_bytes: int = 0
    calibration_calls: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # callers may give a list

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The rows of layers that were quantized."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The rows of layers that were left in float, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.quantized)

    @property
    def mean_layer_error(self) -> float:
        """Mean of `error_after` over the layers where it was measured; 0.0 when none was."""
        return _mean([layer.error_after for layer in self.layers])

    @property
    def mean_layer_error_before(self) -> float:
        """Mean of `error_before` over the layers where it was measured; 0.0 when none was."""
        return _mean([layer.error_before for layer in self.layers])

    @property
    def regions(self) -> int:
        """Number of regions that quantized layers belong to."""
        return len({layer.region for layer in self.quantized if layer.region is not None})

    @property
    def accepted_regions(self) -> int:
        """Number of regions whose permutation or rotation was kept."""
        kept = (layer for layer in self.quantized if layer.accepted and layer.region is not None)
        return len({layer.region for layer in kept})

    @property
    def summary(self) -> str:
        """One line."""
        parts = [f"{len(self.quantized)} of {len(self.layers)} linears quantized"]
        if self.regions:
            parts.append(f"{self.accepted_regions} of {self.regions} regions reordered or rotated")
        before, after = self.mean_layer_error_before, self.mean_layer_error
        if after:
            change = f", {100 * (after / before - 1):+.1f} %" if before else ""
            parts.append(f"mean layer error {after:.4g} (before {before:.4g}{change})")
        if self.weight_bytes and self.float_weight_bytes:
            ratio = self.float_weight_bytes / self.weight_bytes
            parts.append(
                f"weights {size_text(self.float_weight_bytes)} -> {size_text(self.weight_bytes)} "
                f"({ratio:.2f}x smaller)"
            )
        return "; ".join(parts) + f"; {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON. A number that is not finite becomes the string "nan" or "inf"."""
        return {
            "report_version": REPORT_VERSION,
            "config": self.config.to_dict(),
            "recipe": parts_on(self.config.recipe),
            "seconds": self.seconds,
            "weight_bytes": self.weight_bytes,
            "float_weight_bytes": self.float_weight_bytes,
            "calibration_calls": self.calibration_calls,
            "device": self.device,
            "mean_layer_error": _json_number(self.mean_layer_error),
            "mean_layer_error_before": _json_number(self.mean_layer_error_before),
            "regions": self.regions,
            "accepted_regions": self.accepted_regions,
            "layers": [
                {key: _json_number(value) for key, value in asdict(layer).items()}
                for layer in self.layers
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as text, with sorted keys, so that equal reports give equal bytes."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`.

        Raises:
            ReportError: another version, or fields that are missing or unknown.
        """
        if not isinstance(plain, Mapping):
            raise ReportError(f"a report is a table; found {type(plain).__name__}")
        version = plain.get("report_version")
        if version != REPORT_VERSION:
            raise ReportError(f"report_version is {version!r}; this release reads {REPORT_VERSION}")
        names = {f.name for f in fields(cls)} - {"layers", "config"}
        try:
            layers = tuple(_layer(row) for row in plain["layers"])
            values = {name: plain[name] for name in names}
            config = QuantConfig.from_dict(plain["config"])
            recipe = plain["recipe"] if "recipe" in plain else _older_recipe(config, layers)
            config = _as_converted(config, recipe)
            return cls(layers=layers, config=config, **values)
        except (KeyError, TypeError, ConfigError) as error:
            raise ReportError(f"the report is incomplete or damaged: {error}") from error

    def attach(self, model: nn.Module) -> None:
        """Leave the report on the model that it is about, for `pq_fx.save` to find."""
        setattr(model, _ATTRIBUTE, self)

    @classmethod
    def of_model(cls, model: nn.Module) -> Report | None:
        """The report that was left on a model, or None."""
        found = getattr(model, _ATTRIBUTE, None)
        return found if isinstance(found, cls) else None

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Take the report off a model that it is not about any more."""
        model.__dict__.pop(_ATTRIBUTE, None)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [_layer_table(self.quantized)] if self.quantized else []
        if self.skipped:
            parts.append(_skip_table(self.skipped))
        return Group(*parts, Text(self.summary))

    def __str__(self) -> str:
        console = Console(width=170, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _older_recipe(config: QuantConfig, layers: Sequence[LayerReport]) -> dict[str, Any]:
    """What a report from before `recipe` meant: before full ranges `best` gave int4 and int3, as its rows show, and
    nvfp4 had no other scales."""
    keys = (key for row in layers for key in (row.format, row.activation_format))
    names = {key.split(":")[0] for key in keys if key is not None and key.endswith(":bf16")}
    recipe = parts_on(config.recipe)
    recipe.pop("four_over_six", None)
    if not names.isdisjoint(FULL_RANGE) and names.isdisjoint(FULL_RANGE.values()):
        recipe.pop("full_range", None)
    return recipe


def _as_converted(config: QuantConfig, recipe: Mapping[str, Any]) -> QuantConfig:
    """The settings with those parts of the method that were on in the conversion, and no others."""
    changed = parts_between(config.recipe, recipe)
    return replace(config, parts={**(config.parts or {}), **changed}) if changed else config


def _layer_table(layers: Sequence[LayerReport]) -> FittingTable:
    regions = list(dict.fromkeys(layer.region for layer in layers if layer.region is not None))

    def column(
        name: str, cell: Callable[[LayerReport], str], rank: int, right: bool = False
    ) -> Column:
        return Column(name, [cell(layer) for layer in layers], rank, right)

    return FittingTable(
        "Quantized linears",
        [
            _names(layers),
            column("in x out", _shape, 5, right=True),
            column("weight", lambda r: r.format or "", 3),
            column("input", lambda r: r.activation_format or "16 bit", 4),
            column("region", lambda r: str(regions.index(r.region) + 1) if r.region else "", 7),
            column("absorbed", lambda r: "" if r.absorb in (None, "none") else str(r.absorb), 6),
            column("alpha", lambda r: "" if r.alpha is None else f"{r.alpha:g}", 9),
            column("rot.", lambda r: str(r.rotation) if r.rotation else "", 8),
            column("error before", lambda r: _error(r.error_before), 2, right=True),
            column("error after", lambda r: _error(r.error_after), 0, right=True),
            column("change", _change, 1, right=True),
        ],
    )


def _skip_table(layers: Sequence[LayerReport]) -> FittingTable:
    reasons = Column("reason", [layer.skip_reason or "" for layer in layers], folds=True)
    shapes = Column("in x out", [_shape(layer) for layer in layers], right=True)
    return FittingTable("Left in float", [_names(layers), shapes, reasons])


def _names(layers: Sequence[LayerReport]) -> Column:
    return Column("layer", [layer.fqn for layer in layers], folds=True)


def _shape(layer: LayerReport) -> str:
    return f"{layer.in_features} x {layer.out_features}"


def _change(layer: LayerReport) -> str:
    before, after = layer.error_before, layer.error_after
    return "" if not before or after is None else f"{100 * (after / before - 1):+.1f} %"


def _layer(row: Mapping[str, Any]) -> LayerReport:
    values = dict(row)
    for name in ("error_before", "error_after", "alpha"):
        if isinstance(values.get(name), str):
            values[name] = float(values[name])
    return LayerReport(**values)


def _mean(values: Sequence[float | None]) -> float:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else 0.0


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3e}"


def size_text(count: int) -> str:
    """Bytes for people: "5.95 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
