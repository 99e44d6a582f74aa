"""A checkpoint's table of linears, and the checks of a model and of tensors against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx.errors import CheckpointError, FormatError
from pq_fx.kernels.formats import Format
from pq_fx.modules import QuantLinear
from pq_fx.report import Report

QUANTIZER = "input_quantizer"


@dataclass(frozen=True)
class LayerEntry:
    """One quantized linear; `input_quantizer` names an entry of `Plan.quantizers` or is None."""

    in_features: int
    out_features: int
    weight_format: str
    bias: bool
    input_quantizer: str | None
    low_rank: int = 0


@dataclass(frozen=True)
class QuantizerEntry:
    """One quantizer of a tensor, stored once for all linears that read it."""

    channels: int
    format: str
    rotation: int
    perm: bool
    global_scale: bool
    clip: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Plan:
    """All quantized linears of a model by fully qualified name, and their input quantizers."""

    layers: dict[str, LayerEntry]
    quantizers: dict[str, QuantizerEntry]

    @classmethod
    def of_model(cls, linears: Mapping[str, QuantLinear]) -> Plan:
        """Describe a quantized model; a shared quantizer gets the name of its first linear's."""
        names: dict[int, str] = {}
        layers, quantizers = {}, {}
        for fqn, linear in linears.items():
            quantizer = linear.input_quantizer
            name = None
            if quantizer is not None:
                name = names.setdefault(id(quantizer), f"{fqn}.{QUANTIZER}")
                quantizers[name] = QuantizerEntry(
                    quantizer.channels,
                    quantizer.format,
                    quantizer.rotation,
                    quantizer.perm is not None,
                    quantizer.global_scale is not None,
                    quantizer.clip is not None,
                    quantizer.smooth is not None,
                )
            layers[fqn] = LayerEntry(
                linear.in_features,
                linear.out_features,
                linear.weight_format,
                linear.bias is not None,
                name,
                0 if linear.low_rank_up is None else linear.low_rank_up.shape[1],
            )
        return cls(layers, quantizers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "layers": {fqn: asdict(entry) for fqn, entry in self.layers.items()},
            "input_quantizers": {name: asdict(entry) for name, entry in self.quantizers.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """Read a plan back, its formats and references checked.

        Raises:
            CheckpointError: a field is missing, unknown or of the wrong type, a format is unknown
                or does not fit its layer, or a quantizer is missing or unused.
        """
        layers = _entries(LayerEntry, plain.get("layers"), "layers")
        quantizers = _entries(QuantizerEntry, plain.get("input_quantizers"), "input_quantizers")
        if not layers:
            raise CheckpointError("the checkpoint's config.json lists no layers")
        for fqn, layer in layers.items():
            _check_format(fqn, layer.weight_format, layer.in_features)
            if layer.input_quantizer is None:
                continue
            quantizer = quantizers.get(layer.input_quantizer)
            if quantizer is None:
                raise CheckpointError(f"{fqn}: no input quantizer {layer.input_quantizer!r}")
            if quantizer.channels != layer.in_features:
                raise CheckpointError(
                    f"{fqn} has {layer.in_features} input channels, but its quantizer "
                    f"{layer.input_quantizer} has {quantizer.channels}"
                )
        for name, quantizer in quantizers.items():
            _check_format(name, quantizer.format, quantizer.channels)
            size = quantizer.rotation
            if size and (size < 0 or size & (size - 1) or quantizer.channels % size):
                raise CheckpointError(
                    f"{name}: rotation {size} is not a power of two that divides its "
                    f"{quantizer.channels} channels"
                )
        used = {layer.input_quantizer for layer in layers.values()}
        if unused := sorted(set(quantizers) - used):
            raise CheckpointError(f"input quantizers of no layer: {_some(unused)}")
        return cls(layers, quantizers)

    # Checks -------------------------------------------------------------------------------------

    def pointwise_names(self) -> set[str]:
        """What may be pointwise convolutions in the float model: they hold their layer as `.linear`."""
        return {n.removesuffix(".linear") for n in self.layers if n.endswith(".linear")}

    def check_model(self, model: nn.Module) -> None:
        """Raise CheckpointError unless each layer is a linear of the same size in `model`."""
        modules = dict(model.named_modules())
        for fqn, entry in self.layers.items():
            module = modules.get(fqn)
            if module is None:
                raise CheckpointError(
                    f"the checkpoint has a layer {fqn!r}; {type(model).__name__} has none of that "
                    "name: it is of another architecture or configuration"
                )
            if not isinstance(module, nn.Linear | QuantLinear):
                raise CheckpointError(
                    f"{fqn} is {type(module).__name__} in the model; expected nn.Linear"
                )
            if (module.in_features, module.out_features) != (entry.in_features, entry.out_features):
                raise CheckpointError(
                    f"{fqn} is {entry.in_features} x {entry.out_features} in the checkpoint and "
                    f"{module.in_features} x {module.out_features} in the model"
                )
            if (module.bias is not None) != entry.bias:
                has = "has a bias" if entry.bias else "has no bias"
                raise CheckpointError(f"{fqn} {has} in the checkpoint, unlike in the model")
        others = (name for name, module in modules.items() if isinstance(module, QuantLinear))
        if foreign := [name for name in others if name not in self.layers]:
            raise CheckpointError(
                f"{_some(foreign)}: quantized in the model, but not in the checkpoint; load into a "
                "float model"
            )

    def check_report(self, report: Report | None) -> None:
        """Raise CheckpointError where the report of the conversion, if there is one, tells of other formats.

        A layer whose input quantizer was struck out, or taken for another one, would load and compute nonsense; no
        tensor shows it.
        """
        for row in () if report is None else report.quantized:
            layer = self.layers.get(row.fqn)
            if layer is None:
                continue  # dequantized since, or saved as part of another model
            used = self.quantizers.get(layer.input_quantizer or "")
            told = row.format, row.activation_format, row.rotation
            found = layer.weight_format, used and used.format, used.rotation if used else 0
            if told[0] is not None and told != found:
                raise CheckpointError(
                    f"{row.fqn} has (weight, input, rotation) {found} in config.json, and the report beside it says "
                    f"{told}: one of the files was changed. Copy both again"
                )

    def expected(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """(dtype, shape) of each tensor of the quantized linears; dtype None: any float."""
        result: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        for fqn, layer in self.layers.items():
            fmt, rows = Format.parse(layer.weight_format), layer.out_features
            result[f"{fqn}.weight"] = torch.uint8, (rows, fmt.packed_bytes(layer.in_features))
            result[f"{fqn}.weight_scale"] = fmt.scale_dtype, (rows, fmt.groups(layer.in_features))
            if fmt.two_level:
                result[f"{fqn}.weight_global_scale"] = torch.float32, ()
            if layer.bias:
                result[f"{fqn}.bias"] = None, (rows,)
            if layer.low_rank:
                result[f"{fqn}.low_rank_up"] = None, (rows, layer.low_rank)
                result[f"{fqn}.low_rank_down"] = None, (layer.low_rank, layer.in_features)
        for name, quantizer in self.quantizers.items():
            if quantizer.perm:
                result[f"{name}.perm"] = torch.int32, (quantizer.channels,)
            if quantizer.global_scale:
                result[f"{name}.global_scale"] = torch.float32, ()
            if quantizer.clip:
                result[f"{name}.clip"] = torch.float32, ()
            if quantizer.smooth:
                result[f"{name}.smooth"] = torch.float32, (quantizer.channels,)
        return result

    def check_tensors(self, tensors: Mapping[str, Tensor], floats: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless `tensors` are exactly what the plan and the model need.

        Args:
            tensors: what the file holds.
            floats: the model's unquantized tensors, for their names, shapes and kinds.
        """
        expected = self.expected()
        for name, value in floats.items():
            kind = None if value.is_floating_point() else value.dtype
            expected[name] = kind, tuple(value.shape)
        if missing := [name for name in expected if name not in tensors]:
            raise CheckpointError(f"the checkpoint lacks tensors of the model: {_some(missing)}")
        if extra := [name for name in tensors if name not in expected]:
            raise CheckpointError(
                f"the checkpoint has tensors unknown to the model: {_some(extra)}"
            )
        for name, (dtype, shape) in expected.items():
            check_kind(name, tensors[name], dtype, shape)
        for name, check in self.checks().items():
            check(name, tensors[name])

    def checks(self) -> dict[str, Callable[[str, Tensor], None]]:
        """For each tensor whose values can be wrong, a function of its name and value that raises CheckpointError."""
        result: dict[str, Callable[[str, Tensor], None]] = {}
        for fqn, layer in self.layers.items():
            fmt = Format.parse(layer.weight_format)
            result[f"{fqn}.weight_scale"] = partial(
                _check_scale, kind=fmt.scale, signed=fmt.full_range
            )
            if fmt.two_level:
                result[f"{fqn}.weight_global_scale"] = partial(_check_scale, kind="fp32")
        for name, quantizer in self.quantizers.items():
            if quantizer.perm:
                result[f"{name}.perm"] = _check_bijection
            if quantizer.global_scale:
                result[f"{name}.global_scale"] = partial(_check_scale, kind="fp32")
            if quantizer.clip:
                result[f"{name}.clip"] = partial(_check_scale, kind="fp32")
            if quantizer.smooth:
                result[f"{name}.smooth"] = partial(_check_scale, kind="fp32")
        return result


def check_kind(name: str, value: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless `value` is of this dtype (None: any float) and shape."""
    fits = value.is_floating_point() if dtype is None else value.dtype == dtype
    if not fits or tuple(value.shape) != shape:
        wanted = "a float type" if dtype is None else str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}; "
            f"expected {wanted} {list(shape)}"
        )


def _entries(kind: type, plain: Any, what: str) -> dict[str, Any]:
    if not isinstance(plain, dict):
        raise CheckpointError(f"the checkpoint's config.json has no table {what!r}")
    types = {f.name: f.type for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    checks = {"int": int, "str": str, "bool": bool, "str | None": str | None}
    result = {}
    for name, row in plain.items():
        if not isinstance(row, dict) or not needed <= set(row) <= set(types):
            found = f"the fields {sorted(row)}" if isinstance(row, dict) else f"{row!r:.80}"
            raise CheckpointError(
                f"{what}[{name!r}] in config.json has {found}; expected the fields {sorted(types)}"
            )
        for key, value in row.items():
            wanted = types[key]
            number = isinstance(value, bool) and wanted == "int"
            if number or not isinstance(value, checks[str(wanted)]):
                raise CheckpointError(f"{what}[{name!r}].{key} is {value!r}; expected {wanted}")
        result[name] = kind(**row)
    return result


def _check_format(name: str, key: str, channels: int) -> None:
    try:
        Format.parse(key).check_channels(channels)
    except FormatError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _check_scale(name: str, value: Tensor, kind: str, signed: bool = False) -> None:
    """Every scale is a finite number above 0 (or below, where scales have a sign): those of zero groups have a floor
    (kernels/reference.py)."""
    # e8m0 is a biased exponent byte, whose only value that is no number is 255 (OCP MX, 5.4.1).
    wide = value.float()
    there = wide != 0 if signed else wide > 0
    good = value.view(torch.uint8) != 255 if kind == "e8m0" else wide.isfinite() & there
    if not bool(good.all()):
        wrong = "not finite or 0" if signed else "not finite or not above 0"
        raise CheckpointError(
            f"{name} holds values that are {wrong}, as no scale is: the file is damaged"
        )


def _check_bijection(name: str, perm: Tensor) -> None:
    ordered = perm.to(torch.int64).sort().values
    if not torch.equal(ordered, torch.arange(len(perm))):
        raise CheckpointError(
            f"{name} is no permutation: it does not hold each of 0 to {len(perm) - 1} once"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
