"""Packing one region: the quantizer of each point's tensor and a packed linear for each weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pq_fx.edits import Edits
from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import nvfp4_global_scale, permute_rotate
from pq_fx.modules import ActivationQuantizer, QuantLinear
from pq_fx.passes.choose import PointChoice, RegionChoice
from pq_fx.passes.evaluate import GLOBAL_SCALE_ROOM
from pq_fx.passes.regions import Point, Region
from pq_fx.report import LayerReport
from pq_fx.rounded import Packed, Rows, rounded, together
from pq_fx.scope import Layer

# Sampled rows that are turned at once.
_ROWS = 128


@dataclass
class Draft:
    """What the swap will do: packed modules and report rows, by module name."""

    modules: dict[str, QuantLinear] = field(default_factory=dict)
    rows: dict[str, LayerReport] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Rows [R, K] of a point: `stored` as calibration kept them, and how the edited model computes them.

    `balance` fp32 [2, K], a center that is taken off and a scale that they are divided by, and `order` int64 [K], a
    fold, are what their producer does; None: nothing. `center` fp32 [K] is what was taken off, in the rows' new order
    and scale; what it gave is in the biases. `smooth` fp32 [K] multiplies them at run time (the inverse is in the
    weights already). `smoothing` is for the report.
    """

    stored: Tensor
    device: torch.device
    balance: Tensor | None = None
    order: Tensor | None = None
    center: Tensor | None = None
    smooth: Tensor | None = None
    smoothing: str | None = None

    def rows(self, part: slice) -> Tensor:
        """Some of them as the linears are given them, fp32 [n, K] on the device."""
        rows = self.stored[part].to(self.device, torch.float32, copy=True)
        if self.balance is not None:
            rows.sub_(self.balance[0]).div_(self.balance[1])
        if self.order is not None:
            for some in rows.split(_ROWS):
                some.copy_(some[:, self.order])
        return rows if self.smooth is None else rows.mul_(self.smooth)


def pack_point(
    view: Region,
    point: Point,
    choice: RegionChoice,
    layers: dict[str, Layer],
    sample: Sample,
    edits: Edits,
    draft: Draft,
) -> None:
    """Pack all linears of a point."""
    own = choice.points.get(point.name, PointChoice(None, 0))
    first = layers[point.linears[0]]
    smooth = sample.smooth
    quantizer = _input_quantizer(point, own, first.activation_format, sample)
    rows = Rows(sample.rows, sample.center, own, quantizer, sample.device)
    packed: dict[str, Packed] = {}
    for names in together([layers[name] for name in point.linears], point.linears):
        weights = [edits.rows(name) for name in names]
        found = rounded([layers[name] for name in names], weights, rows)
        packed |= dict(zip(names, found, strict=True))
    rows.forget_moments()
    for name, made in packed.items():
        layer, weight = layers[name], edits.rows(name)
        fqn, fmt, recipe = layer.fact.fqn, layer.weight_format, layer.config.recipe
        bias = None if layer.module.bias is None else edits.edited(fqn + ".bias").clone()
        if bias is not None and recipe.correct_bias:
            bias += rows.mean_error(weight, made, fmt).to(bias.dtype)
        error = choice.errors[name]
        if recipe.compensate or made.branch is not None:
            error = replace(error, after=rows.error(weight, made, fmt))
        draft.modules[fqn] = _module(layer, made, bias, quantizer, smooth)
        draft.rows[fqn] = LayerReport(
            fqn,
            layer.fact.in_features,
            layer.fact.out_features,
            format=fmt.key,
            activation_format=layer.activation_format.key if layer.activation_format else None,
            region=view.name.removesuffix(".weight"),
            absorb=choice.absorb.get(point.name, "none"),
            alpha=choice.alpha,
            rotation=own.rotation,
            error_before=error.before,
            error_after=error.after,
            accepted=choice.accepted,
            clip=own.clip,
            smooth=sample.smoothing,
            low_rank=0 if made.branch is None else made.branch[0].shape[1],
        )


def _input_quantizer(
    point: Point, own: PointChoice, fmt: Format | None, sample: Sample
) -> ActivationQuantizer | None:
    if fmt is None:
        return None
    device = sample.device
    perm = None if own.perm is None else torch.from_numpy(own.perm).to(device, torch.int32)
    scale = None
    if fmt.two_level:
        starts = range(0, len(sample.stored), _ROWS)
        largest = [
            permute_rotate(sample.rows(slice(i, i + _ROWS)), perm, own.rotation).abs().amax()
            for i in starts
        ]
        scale = nvfp4_global_scale(torch.stack(largest).amax() * GLOBAL_SCALE_ROOM)
    clip = None if own.clip == 1.0 else torch.tensor(own.clip, device=device)
    return ActivationQuantizer(
        point.channels, fmt.key, own.rotation, perm, scale, clip, sample.smooth
    )


def clips(fmt: Format | None) -> tuple[float, ...]:
    """Constants worth trying for the scales of a point's tensor.

    The fewer steps a format has, the more a clipped tail pays. Formats of e2m1 elements have finer
    steps near zero and gain from larger scales, too (1.5: amax / 4 next to amax / 6).
    """
    if fmt is None:
        return ()
    if fmt.scale == "4over6":
        return ()  # each group chooses by itself
    if fmt.element == "e2m1":
        return (0.9, 1.15, 1.33, 1.5) if fmt.scale == "e8m0" else (0.9, 1.1, 1.25, 1.5)
    if fmt.full_range:
        # Steps are an eighth (a quarter) finer already, so less is worth cutting off.
        return {3: (1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 4: (1.05, 0.95, 0.9, 0.85)}[fmt.bits]
    return {3: (0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 4: (0.95, 0.9, 0.85, 0.8)}.get(fmt.bits, ())


def _module(
    layer: Layer,
    packed: Packed,
    bias: Tensor | None,
    quantizer: ActivationQuantizer | None,
    smooth: Tensor | None,
) -> QuantLinear:
    dtype = layer.module.weight.dtype
    up = down = None
    if packed.branch is not None:
        up, down = packed.branch
        # The branch reads the tensor as it comes, so the smoothing goes into its weight.
        down = down if smooth is None else down * smooth
        up, down = up.to(dtype).contiguous(), down.to(dtype).contiguous()
    return QuantLinear(
        layer.fact.in_features,
        layer.fact.out_features,
        layer.weight_format.key,
        packed.bytes,
        packed.scale.contiguous(),
        packed.global_scale,
        bias,
        quantizer,
        up,
        down,
    )
