"""Rounding a point's weights by its sampled rows, and what is lost by it.

On a GPU a weight's fp32 copies exist for some of its rows at a time: rows are rounded independently of each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from pq_fx.edits import EditedRows
from pq_fx.kernels.formats import Format
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
from pq_fx.modules import ActivationQuantizer
from pq_fx.passes.choose import PointChoice
from pq_fx.passes.rounding import SecondMoment, gptq, second_moment
from pq_fx.passes.turned import exact_matmul
from pq_fx.scope import Layer

log = logging.getLogger("pq_fx")

# Elements that are rounded at once, and that are turned or multiplied at once, in fp32.
_ROUNDED = {"cpu": 1 << 25, "cuda": 1 << 23}
_TURNED = 1 << 22


@dataclass
class Packed:
    """A rounded weight [N, K], and the 16-bit branch beside it: up [N, r], down [r, K], or None."""

    q: Quantized
    branch: tuple[Tensor, Tensor] | None


class Rows:
    """A point's sampled rows as its linears will see them: half to fit on, half to measure with.

    `plain` fp32 [R, K] as the edited model computes them; `center` fp32 [K] was taken off; `own` and `quantizer` are
    what was chosen for the point.
    """

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
        fmt = None if quantizer is None else Format.parse(quantizer.format)
        self.seen = torch.empty(plain.shape, device=plain.device)
        for part in _parts(plain, _TURNED):
            x = permute_rotate(plain[part], self.perm, self.rotation)
            if quantizer is not None and fmt is not None:
                clip, whole = quantizer.clip, quantizer.global_scale
                x = fake_quantize(x, fmt, global_scale=whole, clip=clip)
            self.seen[part] = x
        self._moments: dict[int, SecondMoment] = {}

    def turned(self, weight: Tensor) -> Tensor:
        """The weight [N, K] in the order and rotation of the rows, fp32."""
        made = torch.empty(weight.shape, device=weight.device)
        for part in _parts(weight, _TURNED):
            made[part] = permute_rotate(weight[part].float(), self.perm, self.rotation)
        return made

    def largest(self, weight: Tensor | EditedRows) -> Tensor:
        """The largest magnitude of the turned weight, fp32 []."""
        parts = _parts(weight, _TURNED)
        return torch.stack([self.turned(weight[part]).abs().amax() for part in parts]).amax()

    def moment(self, group: int) -> SecondMoment:
        """What rounding needs to know; made once for all linears of the point."""
        if group not in self._moments:
            self._moments[group] = second_moment(self.seen[0::2], group=group)
        return self._moments[group]

    def error(self, weight: Tensor | EditedRows, packed: Packed, fmt: Format) -> float:
        """Relative squared output error on the half that nothing was fitted on."""
        sums = torch.zeros(2, device=self.plain.device)
        for wanted, error, own in self._differences(weight, packed, fmt, slice(1, None, 2)):
            if self.center is not None:
                wanted = wanted + self.center @ own.T
            sums += torch.stack([error.square().sum(), wanted.square().sum()])
        lost, whole = sums.tolist()
        return lost / whole if whole > 0 else 0.0

    def mean_error(self, weight: Tensor | EditedRows, packed: Packed, fmt: Format) -> Tensor:
        """What a bias must add to make the mean output right, fp32 [N], fitted on the first half."""
        found = self._differences(weight, packed, fmt, slice(0, None, 2))
        return -torch.cat([error.mean(dim=0) for _, error, _ in found])

    def _differences(
        self, weight: Tensor | EditedRows, packed: Packed, fmt: Format, part: slice
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Wanted outputs and their errors, fp32 [rows, n], and the weight fp32 [n, K], some n at a time."""
        plain, seen = self.plain[part], self.seen[part]
        for some in _parts(weight, _TURNED):
            own = weight[some].float()
            q = packed.q._replace(codes=packed.q.codes[some], scale=packed.q.scale[some])
            with exact_matmul():
                wanted = plain @ own.T
                got = seen @ dequantize(q, fmt).T
                if packed.branch is not None:
                    up, down = packed.branch
                    got += (plain @ down.T) @ up[some].T
            yield wanted, got - wanted, own


def ratios(fmt: Format) -> tuple[float, ...]:
    """Ratios of the largest magnitude that are worth trying for a weight's scales."""
    if fmt.scale == "e8m0":
        return (1.0, 2.0)  # powers of two only: the scale, or the next
    return NVFP4_CLIP_RATIOS + WEIGHT_CLIP_RATIOS[1:] if fmt.two_level else WEIGHT_CLIP_RATIOS


def together(layers: Sequence[Layer], names: Sequence[str]) -> list[list[str]]:
    """The linears of a point in lists that are rounded as one matrix: a GPU waits for launches, not for rows.

    Alone are those of another way of rounding, of formats that scale a whole tensor, with low-rank branches, and large
    ones.
    """
    lists: list[list[str]] = []
    before, size = None, 0
    for layer, name in zip(layers, names, strict=True):
        recipe, own = layer.config.recipe, layer.fact.in_features * layer.fact.out_features
        way = (layer.weight_format.key, recipe)
        joins = recipe.compensate and not recipe.low_rank and not layer.weight_format.two_level
        if joins and way == before and size + own <= _rounded_at_once(layer.module.weight):
            lists[-1].append(name)
            size += own
        else:
            lists.append([name])
            size = own
        before = way
    return lists


def rounded(layers: Sequence[Layer], weights: Sequence[EditedRows], rows: Rows) -> list[Packed]:
    """Round the weights [N, K] of one list of `together`."""
    first = layers[0]
    if len(layers) == 1:
        return [_rounded(first, weights[0], rows)]
    q = _rounded(first, torch.cat([w[:] for w in weights]), rows).q
    parts = [t.split([len(w) for w in weights]) for t in (q.codes, q.scale)]
    return [
        Packed(Quantized(codes, scale, None), None) for codes, scale in zip(*parts, strict=True)
    ]


def _rounded(layer: Layer, weight: Tensor | EditedRows, rows: Rows) -> Packed:
    fmt, recipe = layer.weight_format, layer.config.recipe
    branch = None
    if recipe.low_rank and not layer.one_row:
        weight = weight[:].float()
        branch = _low_rank(weight, recipe.low_rank)
        weight = weight - branch[0] @ branch[1]
    scale = nvfp4_global_scale(rows.largest(weight)) if fmt.two_level else None
    tried = ratios(fmt) if recipe.search else ()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = []
    for part in _parts(weight, _rounded_at_once(weight) if recipe.compensate else _TURNED):
        turned = rows.turned(weight[part])
        if recipe.compensate:
            moment, columns = rows.moment(fmt.group_size), _columns(weight.device.type)
            q = gptq(turned, moment, fmt, global_scale=scale, scale_search=tried, columns=columns)
        else:
            q = quantize(turned, fmt, global_scale=scale, scale_search=tried)
        codes[part] = q.codes
        scales.append(q.scale)
    return Packed(Quantized(codes, torch.cat(scales), scale), branch)


@cache
def _columns(kind: str) -> Callable[..., None] | None:
    """What rounds a group's columns on this kind of device: on a GPU one kernel, which needs Triton."""
    if kind != "cuda":
        return None
    if find_spec("triton") is None:
        log.warning("Triton is not installed: weights are rounded column by column, which is slow")
        return None
    from pq_fx.kernels.round_columns import round_columns

    return round_columns


def _rounded_at_once(weight: Tensor | EditedRows) -> int:
    return _ROUNDED["cuda" if weight.device.type == "cuda" else "cpu"]


def _parts(weight: Tensor | EditedRows, elements: int) -> Iterator[slice]:
    """Rows of a matrix, so many elements at a time."""
    step = max(1, elements // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of that rank as up [N, r] times down [r, K], each with half of the
    singular values (SVDQuant, arXiv 2411.05007, section 4.2)."""
    with exact_matmul():
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, v[:rank] * root[:, None]
