"""Packing one region: the quantizer of each point's tensor and a packed linear for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pq_fx.edits import Edits
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
from pq_fx.passes.choose import PointChoice, RegionChoice
from pq_fx.passes.evaluate import GLOBAL_SCALE_ROOM, exact_matmul
from pq_fx.passes.regions import Point, Region
from pq_fx.passes.rounding import SecondMoment, gptq, second_moment
from pq_fx.report import LayerReport
from pq_fx.scope import Layer


@dataclass
class Draft:
    """What the swap will do: packed modules and report rows, by module name."""

    modules: dict[str, QuantLinear] = field(default_factory=dict)
    rows: dict[str, LayerReport] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Rows fp32 [R, K] of a point as the edited model computes them.

    `center` fp32 [K] was taken off them; what it gave is in the biases. `smooth` fp32 [K] multiplies them at run time
    (the inverse is in the weights already); None: nothing does. `smoothing` is for the report.
    """

    rows: Tensor
    center: Tensor | None = None
    smooth: Tensor | None = None
    smoothing: str | None = None


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
    seen = sample.rows if smooth is None else sample.rows * smooth
    quantizer = _input_quantizer(point, own, first.activation_format, seen, smooth)
    rows = _Rows(seen, sample.center, own, quantizer)
    weights = {name: edits.edited(name).float() for name in point.linears}
    together = _rounded_together([layers[n] for n in point.linears], weights, rows)
    for name in point.linears:
        layer = layers[name]
        fqn = layer.fact.fqn
        weight = weights.pop(name)
        packed = together.get(name) or _packed_weight(layer, weight, rows)
        bias_name = fqn + ".bias"
        bias = None if layer.module.bias is None else edits.edited(bias_name).clone()
        if bias is not None and layer.config.recipe.correct_bias:
            bias += rows.mean_error(weight, packed, layer.weight_format).to(bias.dtype)
        error = choice.errors[name]
        if layer.config.recipe.compensate or packed.branch is not None:
            error = replace(error, after=rows.error(weight, packed, layer.weight_format))
        draft.modules[fqn] = _module(layer, packed, bias, quantizer, smooth)
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
            clip=own.clip,
            smooth=sample.smoothing,
            low_rank=0 if packed.branch is None else packed.branch[0].shape[1],
        )


@dataclass
class _Packed:
    """A rounded weight [N, K], and the 16-bit branch beside it: up [N, r], down [r, K], or None."""

    q: Quantized
    branch: tuple[Tensor, Tensor] | None


def _input_quantizer(
    point: Point, own: PointChoice, fmt: Format | None, rows: Tensor, smooth: Tensor | None
) -> ActivationQuantizer | None:
    if fmt is None:
        return None
    perm = None if own.perm is None else torch.from_numpy(own.perm).to(rows.device, torch.int32)
    scale = None
    if fmt.two_level:
        amax = permute_rotate(rows, perm, own.rotation).abs().amax()
        scale = nvfp4_global_scale(amax * GLOBAL_SCALE_ROOM)
    clip = None if own.clip == 1.0 else torch.tensor(own.clip, device=rows.device)
    return ActivationQuantizer(point.channels, fmt.key, own.rotation, perm, scale, clip, smooth)


class _Rows:
    """A point's sampled rows as its linears will see them: half to fit on, half to measure with."""

    def __init__(
        self,
        plain: Tensor,
        center: Tensor | None,
        own: PointChoice,
        quantizer: ActivationQuantizer | None,
    ) -> None:
        self.perm = None if own.perm is None else torch.from_numpy(own.perm).to(plain.device)
        self.rotation = own.rotation
        self.plain = plain
        self.center = center
        self.seen = permute_rotate(plain, self.perm, self.rotation)
        if quantizer is not None:
            fmt = Format.parse(quantizer.format)
            self.seen = fake_quantize(
                self.seen, fmt, global_scale=quantizer.global_scale, clip=quantizer.clip
            )
        self._moments: dict[int, SecondMoment] = {}

    def apply(self, weight: Tensor) -> Tensor:
        """The weight [N, K] in the order and rotation of the rows."""
        return permute_rotate(weight, self.perm, self.rotation)

    def moment(self, group: int) -> SecondMoment:
        """What rounding needs to know; made once for all linears of the point."""
        if group not in self._moments:
            self._moments[group] = second_moment(self.seen[0::2], group=group)
        return self._moments[group]

    def _difference(
        self, weight: Tensor, packed: _Packed, fmt: Format, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Wanted outputs and the packed weight's errors, fp32 [rows, N]."""
        with exact_matmul():
            wanted = self.plain[part] @ weight.T
            got = self.seen[part] @ dequantize(packed.q, fmt).T
            if packed.branch is not None:
                up, down = packed.branch
                got += (self.plain[part] @ down.T) @ up.T
        return wanted, got - wanted

    def error(self, weight: Tensor, packed: _Packed, fmt: Format) -> float:
        """Relative squared output error on the half that nothing was fitted on."""
        wanted, lost = self._difference(weight, packed, fmt, slice(1, None, 2))
        if self.center is not None:
            wanted = wanted + self.center @ weight.T
        whole = wanted.square().sum()
        return float(lost.square().sum() / whole) if whole > 0 else 0.0

    def mean_error(self, weight: Tensor, packed: _Packed, fmt: Format) -> Tensor:
        """What a bias must add to make the mean output right, fp32 [N], fitted on the first half."""
        return -self._difference(weight, packed, fmt, slice(0, None, 2))[1].mean(dim=0)


def ratios(fmt: Format) -> tuple[float, ...]:
    """Ratios of the largest magnitude that are worth trying for a weight's scales."""
    if fmt.scale == "e8m0":
        return (1.0, 2.0)  # powers of two only: the scale, or the next
    return NVFP4_CLIP_RATIOS + WEIGHT_CLIP_RATIOS[1:] if fmt.two_level else WEIGHT_CLIP_RATIOS


def clips(fmt: Format | None) -> tuple[float, ...]:
    """Constants worth trying for the scales of a point's tensor.

    The fewer steps a format has, the more a clipped tail pays. Formats of e2m1 elements have finer
    steps near zero and gain from larger scales, too (1.5: amax / 4 next to amax / 6).
    """
    if fmt is None:
        return ()
    if fmt.element == "e2m1":
        return (0.9, 1.15, 1.33, 1.5) if fmt.scale == "e8m0" else (0.9, 1.1, 1.25, 1.5)
    return {3: (0.9, 0.85, 0.8, 0.75, 0.7, 0.65), 4: (0.95, 0.9, 0.85, 0.8)}.get(fmt.bits, ())


def _rounded_together(
    layers: list[Layer], weights: Mapping[str, Tensor], rows: _Rows
) -> dict[str, _Packed]:
    """Linears of one point with one way of rounding, as one matrix: a GPU waits for launches, not for rows.

    Empty where each is rounded by itself: formats that scale a whole tensor, low-rank branches.
    """
    first = layers[0]
    ways = {(layer.weight_format.key, layer.config.recipe) for layer in layers}
    if len(layers) < 2 or len(ways) > 1 or first.weight_format.two_level:
        return {}
    if not first.config.recipe.compensate or first.config.recipe.low_rank:
        return {}
    packed = _packed_weight(first, torch.cat(list(weights.values())), rows)
    parts = [t.split([len(w) for w in weights.values()]) for t in packed.q[:2]]
    return {
        name: _Packed(Quantized(codes, scale, None), None)
        for name, codes, scale in zip(weights, *parts, strict=True)
    }


def _packed_weight(layer: Layer, weight: Tensor, rows: _Rows) -> _Packed:
    fmt, recipe = layer.weight_format, layer.config.recipe
    branch = None
    if recipe.low_rank and not layer.one_row:
        branch = _low_rank(weight, recipe.low_rank)
        weight = weight - branch[0] @ branch[1]
    turned = rows.apply(weight)
    scale = nvfp4_global_scale(turned.abs().amax()) if fmt.two_level else None
    tried = ratios(fmt) if recipe.search else ()
    if recipe.compensate:
        moment = rows.moment(fmt.group_size)
        return _Packed(gptq(turned, moment, fmt, global_scale=scale, scale_search=tried), branch)
    return _Packed(quantize(turned, fmt, global_scale=scale, scale_search=tried), branch)


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of that rank as up [N, r] times down [r, K], each with half of the
    singular values (SVDQuant, arXiv 2411.05007, section 4.2)."""
    with exact_matmul():
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, v[:rank] * root[:, None]


def _module(
    layer: Layer,
    packed: _Packed,
    bias: Tensor | None,
    quantizer: ActivationQuantizer | None,
    smooth: Tensor | None,
) -> QuantLinear:
    q, dtype = packed.q, layer.module.weight.dtype
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
        pack(q.codes, layer.weight_format),
        q.scale.contiguous(),
        q.global_scale,
        bias,
        quantizer,
        up,
        down,
    )
