"""Converting a calibrated model: choose, fold, pack; then swap, all at once.

Everything is computed beside the float model first. Only when every layer is packed are modules replaced, so an error
on the way (memory, a bad statistic) leaves the model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from pq_fx.calibrate import Statistics
from pq_fx.config import METHODS, QuantConfig
from pq_fx.decide import decide
from pq_fx.errors import CalibrationError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import (
    NVFP4_CLIP_RATIOS,
    WEIGHT_CLIP_RATIOS,
    Quantized,
    dequantize,
    fake_quantize,
    nvfp4_global_scale,
    permute_rotate,
    quantize,
)
from pq_fx.modules import ActivationQuantizer, QuantLinear
from pq_fx.passes.choose import PointChoice, RegionChoice, Settings, choose
from pq_fx.passes.evaluate import GLOBAL_SCALE_ROOM, exact_matmul
from pq_fx.passes.fold import axis_index, fold_tensors
from pq_fx.passes.regions import Point, Region
from pq_fx.passes.rounding import SecondMoment, gptq, second_moment
from pq_fx.passes.verify import verify_folds
from pq_fx.plan import LinearFact, Plan, rename_region
from pq_fx.report import LayerReport, Report


@dataclass
class _Layer:
    """A linear to be quantized, with its own settings."""

    fact: LinearFact
    config: QuantConfig
    module: nn.Linear
    one_row: bool

    @property
    def weight_format(self) -> Format:
        return self.config.weight_only if self.one_row else self.config.weight

    @property
    def activation_format(self) -> Format | None:
        return None if self.one_row else self.config.activation


@dataclass
class _Draft:
    """What the swap will do: new float parameters, new modules, report rows."""

    folded: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, QuantLinear] = field(default_factory=dict)
    rows: dict[str, LayerReport] = field(default_factory=dict)


def convert(
    model: nn.Module,
    statistics: Statistics,
    config: QuantConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Quantize `model` in place by what calibration found and return the report.

    `progress(done, total)` is called after each region. Raises CalibrationError when a region's statistics are
    missing or not finite; the model is unchanged then.
    """
    start = time.perf_counter()
    plan = statistics.plan
    if not plan.linears:
        raise CalibrationError(
            "nothing was calibrated: call the model inside `with quantizer.calibrate():` first"
        )
    draft = _Draft()
    layers = _layers(model, plan, config, draft)
    params = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    views = [v for v in (_restrict(r, layers) for r in plan.regions.values()) if v is not None]
    with torch.no_grad():
        choices: dict[str, RegionChoice] = {}
        for done, view in enumerate(views):
            for point in view.points:
                statistics.moments[_origin(plan, point)].check(point.name)
            choices[view.name] = _choose(view, statistics, plan, layers, params)
            if progress is not None:
                progress(done + 1, 2 * len(views))
        _check_closed(statistics, choices)
        index = _fold_indices(plan, choices, params)
        for done, view in enumerate(views):
            _pack_region(view, choices[view.name], layers, params, index, statistics, plan, draft)
            if progress is not None:
                progress(len(views) + done + 1, 2 * len(views))
        for name, tensor in params.items():
            fqn = name.removesuffix(".weight").removesuffix(".bias")
            if name in {p for p, _ in index} and fqn not in draft.modules:
                draft.folded[name] = _reordered(tensor, name, index)
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    _commit(model, params, draft)
    quantized_bytes = sum(t.numel() * t.element_size() for t in _tensors(model))
    return Report(
        layers=tuple(draft.rows[fqn] for fqn in plan.linears if fqn in draft.rows),
        config=config,
        seconds=time.perf_counter() - start,
        weight_bytes=quantized_bytes,
        float_weight_bytes=float_bytes,
        calibration_calls=statistics.calls,
        device=str(next(iter(params.values())).device),
    )


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _layers(model: nn.Module, plan: Plan, config: QuantConfig, draft: _Draft) -> dict[str, _Layer]:
    """The linears to quantize, by weight name; the others get their report row at once."""
    layers: dict[str, _Layer] = {}
    modules = dict(model.named_modules())
    for fqn, fact in plan.linears.items():
        module = modules.get(fqn)
        decision = decide(fact, config, module)
        if decision.config is None:
            draft.rows[fqn] = LayerReport(
                fqn, fact.in_features, fact.out_features, skip_reason=decision.skip_reason
            )
        else:
            assert isinstance(module, nn.Linear)
            one_row = fact.treatment == "weight_only"
            layers[fqn + ".weight"] = _Layer(fact, decision.config, module, one_row)
    return layers


def _restrict(region: Region, layers: dict[str, _Layer]) -> Region | None:
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


def _origin(plan: Plan, point: Point) -> str:
    """The point that was observed, for a point that may have been split off it."""
    for region in plan.regions.values():
        for candidate in region.points:
            if point.linears[0] in candidate.linears:
                return candidate.name
    raise CalibrationError(f"{point.name} was not observed")


def _settings(layer: _Layer) -> Settings:
    config = layer.config
    return Settings(
        weight=layer.weight_format,
        activation=layer.activation_format,
        sort=config.sort,
        rotate=config.rotate and layer.activation_format is not None,
        alphas=config.alphas,
        tau=config.tau,
        gather_margin=config.gather_margin,
        seed=config.seed,
        weight_search=_ratios(layer.weight_format) if METHODS[config.method].search else (),
    )


def _choose(
    view: Region,
    statistics: Statistics,
    plan: Plan,
    layers: dict[str, _Layer],
    params: dict[str, Tensor],
) -> RegionChoice:
    moments = {p.name: statistics.moments[_origin(plan, p)] for p in view.points}
    names = [n for p in view.points for n in p.linears]
    weights = {n: params[n].detach() for n in names}
    return choose(view, moments, weights, _settings(layers[names[0]]))


def _fold_indices(
    plan: Plan, choices: dict[str, RegionChoice], params: dict[str, Tensor]
) -> dict[tuple[str, int], Tensor]:
    index: dict[tuple[str, int], Tensor] = {}
    for name, choice in choices.items():
        if choice.fold is None:
            continue
        region = plan.regions[name]
        for key, order in fold_tensors(region, choice.fold, params).items():
            # Two regions may hold different positions of one axis (rows of a fused projection): compose them.
            index[key] = order if key not in index else index[key][order]
    return index


def _check_closed(statistics: Statistics, choices: dict[str, RegionChoice]) -> None:
    """Walk every graph again with the folds in place; GraphError where unlike channels would meet."""
    perms = {name: c.fold for name, c in choices.items() if c.fold is not None}
    for gm, names, shapes in statistics.bound:
        placeholders = {fqn: placeholder for placeholder, fqn in names.items()}
        here = [
            rename_region(r, placeholders)
            for r in statistics.plan.regions.values()
            if r.name in perms and all(a.param in placeholders for a in r.axes)
        ]
        verify_folds(
            gm, shapes, here, {placeholders[n]: p for n, p in perms.items() if n in placeholders}
        )


def _reordered(tensor: Tensor, name: str, index: dict[tuple[str, int], Tensor]) -> Tensor:
    for axis in range(tensor.dim()):
        if (name, axis) in index:
            tensor = tensor.index_select(axis, index[name, axis])
    return tensor


def _pack_region(
    view: Region,
    choice: RegionChoice,
    layers: dict[str, _Layer],
    params: dict[str, Tensor],
    index: dict[tuple[str, int], Tensor],
    statistics: Statistics,
    plan: Plan,
    draft: _Draft,
) -> None:
    for point in view.points:
        own = choice.points.get(point.name, PointChoice(None, 0))
        first = layers[point.linears[0]]
        # Statistics may have been gathered on another device than the model is on now.
        device = params[point.linears[0]].device
        sample = statistics.moments[_origin(plan, point)].sample().to(device)
        if choice.fold is not None:
            order = axis_index(view.columns[point.name], choice.fold)
            sample = sample[:, torch.from_numpy(order).to(sample.device)]
        quantizer = _input_quantizer(point, own, first.activation_format, sample)
        rows = _Rows(sample, own, quantizer)
        for name in point.linears:
            layer = layers[name]
            fqn = layer.fact.fqn
            weight = _reordered(params[name].detach(), name, index).float()
            packed = _quantized_weight(layer, rows.apply(weight), rows)
            draft.modules[fqn] = _module(layer, name, packed, quantizer, params, index)
            error = choice.errors[name]
            if METHODS[layer.config.method].compensate:
                error = replace(error, after=rows.error(weight, packed, layer.weight_format))
            draft.rows[fqn] = LayerReport(
                fqn,
                layer.fact.in_features,
                layer.fact.out_features,
                format=layer.weight_format.key,
                activation_format=layer.activation_format.key if layer.activation_format else None,
                region=view.name.removesuffix(".weight"),
                absorb=choice.absorb.get(point.name, "none"),
                alpha=choice.alpha,
                rotation=own.rotation,
                error_before=error.before,
                error_after=error.after,
                accepted=choice.accepted,
            )


def _input_quantizer(
    point: Point, own: PointChoice, fmt: Format | None, sample: Tensor
) -> ActivationQuantizer | None:
    if fmt is None:
        return None
    perm = None if own.perm is None else torch.from_numpy(own.perm).to(sample.device, torch.int32)
    scale = None
    if fmt.two_level:
        amax = permute_rotate(sample.float(), perm, own.rotation).abs().amax()
        scale = nvfp4_global_scale(amax * GLOBAL_SCALE_ROOM)
    clip = None if own.clip == 1.0 else torch.tensor(own.clip, device=sample.device)
    return ActivationQuantizer(point.channels, fmt.key, own.rotation, perm, scale, clip)


class _Rows:
    """A point's sampled rows as its linears will see them: half to round weights by, half to measure with."""

    def __init__(
        self, sample: Tensor, own: PointChoice, quantizer: ActivationQuantizer | None
    ) -> None:
        self.perm = None if own.perm is None else torch.from_numpy(own.perm).to(sample.device)
        self.rotation = own.rotation
        self.plain = sample.float()
        self.seen = permute_rotate(self.plain, self.perm, self.rotation)
        if quantizer is not None:
            fmt = Format.parse(quantizer.format)
            self.seen = fake_quantize(
                self.seen, fmt, global_scale=quantizer.global_scale, clip=quantizer.clip
            )
        self._moments: dict[int, SecondMoment] = {}

    def apply(self, weight: Tensor) -> Tensor:
        """The weight [N, K] in the order and rotation of the rows."""
        return permute_rotate(
            weight, None if self.perm is None else self.perm.to(weight.device), self.rotation
        )

    def moment(self, group: int) -> SecondMoment:
        """What rounding needs to know; made once for all linears of the point."""
        if group not in self._moments:
            self._moments[group] = second_moment(self.seen[0::2], group=group)
        return self._moments[group]

    def error(self, weight: Tensor, packed: Quantized, fmt: Format) -> float:
        """Relative squared output error of the packed weight on the other half of the rows."""
        with exact_matmul():
            wanted = self.plain[1::2] @ weight.T
            got = self.seen[1::2] @ dequantize(packed, fmt).T
        whole = wanted.square().sum()
        return float((got - wanted).square().sum() / whole) if whole > 0 else 0.0


def _ratios(fmt: Format) -> tuple[float, ...]:
    """Ratios of the largest magnitude that are worth trying for a weight's scales."""
    if fmt.scale == "e8m0":
        return (1.0, 2.0)  # powers of two only: the scale, or the next
    return NVFP4_CLIP_RATIOS + WEIGHT_CLIP_RATIOS[1:] if fmt.two_level else WEIGHT_CLIP_RATIOS


def _quantized_weight(layer: _Layer, weight: Tensor, rows: _Rows) -> Quantized:
    fmt, method = layer.weight_format, METHODS[layer.config.method]
    global_scale = nvfp4_global_scale(weight.abs().amax()) if fmt.two_level else None
    ratios = _ratios(fmt) if method.search else ()
    if method.compensate:
        moment = rows.moment(fmt.group_size)
        return gptq(weight, moment, fmt, global_scale=global_scale, scale_search=ratios)
    return quantize(weight, fmt, global_scale=global_scale, scale_search=ratios)


def _module(
    layer: _Layer,
    name: str,
    q: Quantized,
    quantizer: ActivationQuantizer | None,
    params: dict[str, Tensor],
    index: dict[tuple[str, int], Tensor],
) -> QuantLinear:
    fmt = layer.weight_format
    bias_name = name.removesuffix(".weight") + ".bias"
    bias = None
    if layer.module.bias is not None:
        bias = _reordered(params[bias_name].detach(), bias_name, index).clone()
    return QuantLinear(
        layer.fact.in_features,
        layer.fact.out_features,
        fmt.key,
        pack(q.codes, fmt),
        q.scale.contiguous(),
        q.global_scale,
        bias,
        quantizer,
    )


def _commit(model: nn.Module, params: dict[str, Tensor], draft: _Draft) -> None:
    """The swap: nothing in here computes, so nothing in here can fail half-way."""
    for name, tensor in draft.folded.items():
        params[name].data.copy_(tensor)
    for fqn, module in draft.modules.items():
        parent, _, child = fqn.rpartition(".")
        setattr(model.get_submodule(parent), child, module.eval())
