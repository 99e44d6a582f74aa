"""Converting a calibrated model: choose, fold, pack; then swap, all at once.

Everything is computed beside the float model first: folds as index tensors, packed linears at 4 bits, never a second
copy of float tensors. On a GPU model packed linears and sampled rows wait in the CPU's memory; the device holds half
of a point's rows and parts of a weight at a time. Only when every layer is packed are modules replaced, one at a time,
so an error on the way (memory, a bad statistic) leaves the model as it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pq_fx import applied
from pq_fx.alike import dissenting, fill_absent
from pq_fx.budget import apply_budget
from pq_fx.config import QuantConfig
from pq_fx.edits import Edits, Scaled
from pq_fx.errors import CalibrationError, DeviceMemoryError
from pq_fx.hooks import carry_hooks
from pq_fx.packing import Draft, Sample, clips, pack_point
from pq_fx.passes.choose import RegionChoice, Settings, choose
from pq_fx.passes.fold import axis_index, fold_tensors
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import Region
from pq_fx.places import Places, fill
from pq_fx.plan import Plan
from pq_fx.report import Report
from pq_fx.rounded import ratios
from pq_fx.scope import Layer, layers_to_quantize, origin, restrict
from pq_fx.smoothing import Smoothed, smooth_region, smoothed_moments, with_errors_before
from pq_fx.statistics import Statistics

# What GPTQ leaves of the weights' part of the output error, as an amplitude; a quarter of its square was
# measured on the demo's models at int4 (0.26) and int3 (0.33).
_LEFT_BY_COMPENSATION = 0.5


def convert(
    model: nn.Module,
    statistics: Statistics,
    config: QuantConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Quantize `model` in place by what calibration found and return the report.

    `progress(done, total)` is called after each region, twice for each: chosen, packed. Raises CalibrationError when a
    region's statistics are missing or not finite, or a linear is held in a way that cannot be changed (places.py); the
    model is unchanged then.
    """
    start = time.perf_counter()
    plan = statistics.plan
    if not plan.linears:
        raise CalibrationError(
            "nothing was calibrated: call the model inside `with quantizer.calibrate():` first"
        )
    draft = Draft()
    layers, draft.rows = layers_to_quantize(model, plan, config)
    places = Places(model)
    places.check(layer.module for layer in layers.values())
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    edits = Edits(tensors)
    views = [v for v in (restrict(r, layers) for r in plan.regions.values()) if v is not None]
    with torch.no_grad():
        for view in views:
            for point in view.points:
                statistics.moments[origin(plan, point)].check(point.name)
        if config.budget_bits is not None:
            _spread_bits(views, statistics, layers, tensors, config.budget_bits)
        choices: dict[str, RegionChoice] = {}
        smoothed: dict[str, Smoothed] = {}
        for done, view in enumerate(views):
            choices[view.name] = _choose(view, statistics, layers, edits, smoothed)
            if progress is not None:
                progress(done + 1, 2 * len(views))
        if config.alike_blocks:
            by_name = {view.name: view for view in views}
            formats = {
                p.name: _format_keys(layers[p.linears[0]]) for view in views for p in view.points
            }
            for name, rotations in dissenting(views, choices, formats).items():
                choices[name] = _choose(
                    by_name[name], statistics, layers, edits, smoothed, rotations
                )
        statistics.check_folds({n: c.fold for n, c in choices.items() if c.fold is not None})
        _enter_folds(plan, choices, edits)
        for done, view in enumerate(views):
            _pack_region(view, choices[view.name], layers, edits, statistics, smoothed, draft)
            if progress is not None:
                progress(len(views) + done + 1, 2 * len(views))
    if config.alike_blocks:
        fill_absent(draft.modules)
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    device = next(iter(tensors.values())).device
    layers.clear()  # they hold the float linears
    _commit(model, places, edits, draft)
    quantized_bytes = sum(t.numel() * t.element_size() for t in _tensors(model))
    return Report(
        layers=tuple(draft.rows[fqn] for fqn in plan.linears if fqn in draft.rows),
        config=config,
        seconds=time.perf_counter() - start,
        weight_bytes=quantized_bytes,
        float_weight_bytes=float_bytes,
        calibration_calls=statistics.calls,
        device=str(device),
    )


def out_of_memory(model: nn.Module, error: torch.OutOfMemoryError) -> DeviceMemoryError:
    """What to say when `convert` ran out of a GPU's memory, which happens before it changes the model."""
    device = next((p.device for p in model.parameters() if p.is_cuda), None)
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    used = 0 if device is None else torch.cuda.memory_allocated(device)
    weights = sum(t.nbytes for t in _tensors(model) if t.device == device)
    return DeviceMemoryError(
        f"{device} ran out of memory while converting: {used / 2**30:.2f} GiB were in use, {weights / 2**30:.2f} GiB "
        f"of them the model's weights, when {asked[1] if asked else 'more'} beyond that was asked for. The model is "
        "unchanged. Free that much on the device, or convert on the CPU: "
        "model.to('cpu'); quantizer.convert(); model.to('cuda')"
    )


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _spread_bits(
    views: list[Region],
    statistics: Statistics,
    layers: dict[str, Layer],
    tensors: Mapping[str, Tensor],
    budget: float,
) -> None:
    rows: dict[str, Tensor] = {}
    for view in views:
        for point in view.points:
            sample = statistics.moments[origin(statistics.plan, point)].sample()[1::2]
            own = sample.to(tensors[point.linears[0]].device, torch.float32)
            rows |= dict.fromkeys(point.linears, own)
    apply_budget(layers, rows, {name: tensors[name].detach() for name in layers}, budget)


def _format_keys(layer: Layer) -> tuple[str, str | None]:
    own = layer.activation_format
    return layer.weight_format.key, None if own is None else own.key


def _settings(layer: Layer) -> Settings:
    config, recipe = layer.config, layer.config.recipe
    return Settings(
        weight=layer.weight_format,
        activation=layer.activation_format,
        sort=recipe.sort,
        rotate=recipe.rotate and layer.activation_format is not None,
        half_rotate=recipe.half_rotate,
        refine=recipe.refine,
        clips=clips(layer.activation_format) if recipe.clip else (),
        alphas=config.alphas,
        tau=config.tau,
        gather_margin=config.gather_margin,
        seed=config.seed,
        # What rounding with compensation leaves differs little between orders: nothing to search for here.
        weight_search=ratios(layer.weight_format)
        if recipe.search and not recipe.compensate
        else (),
        weight_part=_LEFT_BY_COMPENSATION if recipe.compensate else 1.0,
    )


def _moments(statistics: Statistics, view: Region) -> dict[str, Moments]:
    return {p.name: statistics.moments[origin(statistics.plan, p)] for p in view.points}


def _choose(
    view: Region,
    statistics: Statistics,
    layers: dict[str, Layer],
    edits: Edits,
    smoothed: dict[str, Smoothed],
    rotations: Mapping[str, int] | None = None,
) -> RegionChoice:
    settled = rotations or {}
    settings = {
        n: replace(_settings(layers[n]), rotations=settled) for p in view.points for n in p.linears
    }
    moments = _moments(statistics, view)
    own: dict[str, Smoothed] = {}
    recipe = layers[view.points[0].linears[0]].config.recipe
    if recipe.smooth or recipe.balance or recipe.center:
        if rotations is None:
            smoothed.update(smooth_region(view, statistics.plan, moments, edits, settings, recipe))
        own = {p.name: smoothed[p.name] for p in view.points if p.name in smoothed}
        moments |= {name: smoothed_moments(moments[name], s) for name, s in own.items()}
        centers = {name: s.center / s.scale for name, s in own.items()}
        settings = {n: replace(each, centers=centers) for n, each in settings.items()}
    weights = Scaled(edits, [n for p in view.points for n in p.linears])
    return with_errors_before(choose(view, moments, weights, settings), own)


def _enter_folds(plan: Plan, choices: dict[str, RegionChoice], edits: Edits) -> None:
    for name, choice in choices.items():
        if choice.fold is not None:
            for (param, axis), order in fold_tensors(plan.regions[name], choice.fold).items():
                edits.reorder(param, axis, order)


def _pack_region(
    view: Region,
    choice: RegionChoice,
    layers: dict[str, Layer],
    edits: Edits,
    statistics: Statistics,
    smoothed: Mapping[str, Smoothed],
    draft: Draft,
) -> None:
    moments = _moments(statistics, view)
    for point in view.points:
        # Statistics may have been gathered on another device than the model is on now.
        device = edits.tensors[point.linears[0]].device
        own, inverse, center, balance, order = smoothed.get(point.name), None, None, None, None
        if own is not None and own.folded:
            balance, center = torch.stack([own.center, own.scale]), own.center / own.scale
        elif own is not None:
            inverse = 1.0 / own.scale
        if choice.fold is not None:
            order = torch.from_numpy(axis_index(view.columns[point.name], choice.fold)).to(device)
            inverse = None if inverse is None else inverse[order]
            center = None if center is None else center[order]
        how = None if own is None else "folded" if own.folded else "multiply"
        stored = moments[point.name].sample()
        sample = Sample(stored, device, balance, order, center, inverse, how)
        pack_point(view, point, choice, layers, sample, edits, draft)
        if device.type != "cpu":
            for name in point.linears:
                # Where the packed weight is: beside the float model the device has room for neither.
                draft.modules[layers[name].fact.fqn].to("cpu")


def _commit(model: nn.Module, places: Places, edits: Edits, draft: Draft) -> None:
    """The swap: edited tensors are replaced, each float linear goes before its packed one takes its places."""
    edits.commit(model, {f"{fqn}.{kind}" for fqn in draft.modules for kind in ("weight", "bias")})
    devices = {fqn: edits.tensors[f"{fqn}.weight"].device for fqn in draft.modules}
    held = {fqn: places.of(model.get_submodule(fqn)) for fqn in draft.modules}
    edits.tensors.clear()  # they would keep the float weights, some under a second name
    for fqn, module in draft.modules.items():
        device = devices[fqn]
        carry_hooks(model.get_submodule(fqn), module)
        fill(held[fqn], None)
        try:
            module.to(device)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{device} ran out of memory when {fqn} was to take the place of its float weight, which something "
                "besides the model holds. The model is half converted: load it again, and let go of the float weights"
            ) from error
        fill(held[fqn], module.eval())
    applied.note(model, applied.from_edits(model, edits))
