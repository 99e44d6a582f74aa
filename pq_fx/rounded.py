"""Rounding a point's weights by its sampled rows, and what is lost by it.

Rows of a weight are rounded independently of each other, and columns one block after the other, so a GPU holds fp32
copies of a small part of a weight at a time; what is rounded is packed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from pq_fx.edits import EditedRows
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack, unpack
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
from pq_fx.passes.rounding import SecondMoment, gptq, holds_groups, second_moment
from pq_fx.passes.turned import exact_matmul
from pq_fx.scope import Layer

# Keys of rows are random: every other one is a random half.
_FITTED, _HELD_OUT = slice(0, None, 2), slice(1, None, 2)
log = logging.getLogger("pq_fx")

# What rounding at once may hold, in bytes of code points and running errors, and the elements that are turned or
# multiplied at once, in fp32.
_ROUNDED = {"cpu": 1 << 25, "cuda": 3 << 23}
_TURNED = {"cpu": 1 << 22, "cuda": 1 << 21}
Weight: TypeAlias = Tensor | EditedRows


@dataclass
class Packed:
    """A rounded weight [N, K] and the 16-bit branch beside it.

    `bytes` uint8 [N, K * bits / 8] on the CPU; scale [N, K / group]; branch: up [N, r], down [r, K], or None.
    """

    bytes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    branch: tuple[Tensor, Tensor] | None


class Rows:
    """A point's sampled rows as its linears will see them: half to fit on, half to measure with.

    `plain` gives some of them, fp32 [n, K], as the edited model computes them: a wide point's are as large as its
    weight, so they are made from the stored ones when they are needed. `center` fp32 [K] was taken off; `own` and
    `quantizer` are what was chosen for the point.
    """

    def __init__(
        self,
        plain: Callable[[slice], Tensor],
        center: Tensor | None,
        own: PointChoice,
        quantizer: ActivationQuantizer | None,
        device: torch.device,
    ) -> None:
        self.perm = None if own.perm is None else torch.from_numpy(own.perm).to(device)
        self.rotation = own.rotation
        self.plain = plain
        self.center = center
        self.quantizer = quantizer
        self._moments: dict[int, SecondMoment] = {}

    def seen(self, rows: Tensor) -> Tensor:
        """Rows fp32 [n, K] after order, rotation and quantization; overwritten."""
        quantizer = self.quantizer
        fmt = None if quantizer is None else Format.parse(quantizer.format)
        for part in _parts(rows, _turned_at_once(rows)):
            x = permute_rotate(rows[part], self.perm, self.rotation)
            if quantizer is not None and fmt is not None:
                clip, whole = quantizer.clip, quantizer.global_scale
                x = fake_quantize(x, fmt, global_scale=whole, clip=clip)
            rows[part] = x
        return rows

    def turned(self, weight: Tensor) -> Tensor:
        """The weight [N, K] in the order and rotation of the rows, fp32."""
        made = torch.empty(weight.shape, device=weight.device)
        for part in _parts(weight, _turned_at_once(weight)):
            made[part] = permute_rotate(weight[part].float(), self.perm, self.rotation)
        return made

    def largest(self, weight: Weight) -> Tensor:
        """The largest magnitude of the turned weight, fp32 []."""
        parts = _parts(weight, _turned_at_once(weight))
        return torch.stack([self.turned(weight[part]).abs().amax() for part in parts]).amax()

    def moment(self, group: int) -> SecondMoment:
        """What rounding needs to know; made once for all linears of the point."""
        if group not in self._moments:
            self._moments[group] = second_moment(self.seen(self.plain(_FITTED)), group=group)
        return self._moments[group]

    def forget_moments(self) -> None:
        """All linears are rounded: errors need the memory."""
        self._moments.clear()

    def error(self, weight: Weight, packed: Packed, fmt: Format) -> float:
        """Relative squared output error on the half that nothing was fitted on."""
        rows, size = self.plain(_HELD_OUT), torch.zeros(2, device=weight.device)
        wanted = []
        with exact_matmul():
            for some in _parts(weight, _turned_at_once(weight)):
                own = weight[some].float()
                wanted.append(rows @ own.T)
                y = wanted[-1] if self.center is None else wanted[-1] + self.center @ own.T
                size[1] += y.square().sum()
                del own  # before the next one is made
        for error in self._errors(rows, wanted, weight, packed, fmt):
            size[0] += error.square().sum()
        lost, whole = size.tolist()
        return lost / whole if whole > 0 else 0.0

    def mean_error(self, weight: Weight, packed: Packed, fmt: Format) -> Tensor:
        """What a bias must add to make the mean output right, fp32 [N], fitted on the first half."""
        rows = self.plain(_FITTED)
        with exact_matmul():
            parts = _parts(weight, _turned_at_once(weight))
            wanted = [rows @ weight[some].float().T for some in parts]
        found = self._errors(rows, wanted, weight, packed, fmt)
        return -torch.cat([error.mean(dim=0) for error in found])

    def _errors(
        self, rows: Tensor, wanted: list[Tensor], weight: Weight, packed: Packed, fmt: Format
    ) -> Iterator[Tensor]:
        """Errors fp32 [rows, n] of the wanted outputs, some n at a time; `rows` are overwritten."""
        with exact_matmul():
            low = None if packed.branch is None else rows @ packed.branch[1].T
            seen = self.seen(rows)
        for some, y in zip(_parts(weight, _turned_at_once(weight)), wanted, strict=True):
            codes = unpack(packed.bytes[some].to(weight.device), fmt, weight.shape[1])
            q = Quantized(codes, packed.scale[some], packed.global_scale)
            with exact_matmul():
                got = seen @ dequantize(q, fmt).T
                if packed.branch is not None and low is not None:
                    got += low @ packed.branch[0][some].T
            yield got.sub_(y)


class _Turned:
    """Rows `part` of weights [N, K], one below the other, in the order and rotation of `rows`, columns at a time."""

    def __init__(self, weights: Sequence[Weight], part: slice, rows: Rows) -> None:
        self._weights, self._part, self._rows = weights, part, rows
        count = sum(len(range(*part.indices(len(w)))) for w in weights)
        self.shape = torch.Size((count, weights[0].shape[1]))
        self.device = weights[0].device

    def columns(self, index: Tensor) -> Tensor:
        """Columns `index` (int64 [b]: whole blocks of the rotation, in any order), fp32 [N, b]."""
        index, places = index.sort()
        read = index if self._rows.perm is None else self._rows.perm[index]
        found = torch.cat([_columns_of(w, self._part, read).float() for w in self._weights])
        return permute_rotate(found, None, self._rows.rotation)[:, places.argsort()]


def _columns_of(weight: Weight, part: slice, index: Tensor) -> Tensor:
    return weight[part][:, index] if isinstance(weight, Tensor) else weight.columns(part, index)


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
        recipe, own = layer.config.recipe, layer.fact.out_features
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
        return [_rounded(first, weights, rows)]
    packed = _rounded(first, weights, rows)
    parts = [t.split([len(w) for w in weights]) for t in (packed.bytes, packed.scale)]
    return [
        Packed(found.clone(), scale.clone(), None, None)
        for found, scale in zip(*parts, strict=True)
    ]


def _rounded(layer: Layer, weights: Sequence[Weight], rows: Rows) -> Packed:
    """Several weights are few enough rows for one part."""
    fmt, recipe, branch = layer.weight_format, layer.config.recipe, None
    if recipe.low_rank and not layer.one_row:
        wide = weights[0][:].float()
        branch = _low_rank(wide, recipe.low_rank)
        weights = [wide - branch[0] @ branch[1]]
    weight = weights[0]
    count, channels = sum(len(w) for w in weights), weight.shape[1]
    whole = nvfp4_global_scale(rows.largest(weight)) if fmt.two_level else None
    tried = ratios(fmt) if recipe.search else ()
    made = torch.empty(count, fmt.packed_bytes(channels), dtype=torch.uint8)
    step = _rounded_at_once(weight) if recipe.compensate else _turned_at_once(weight) // channels
    scales = []
    for start in range(0, count, max(1, step)):
        part = slice(start, start + max(1, step))
        if recipe.compensate:
            moment, columns = rows.moment(fmt.group_size), _columns(weight.device.type)
            turned: Tensor | _Turned = _Turned(weights, part, rows)
            if not holds_groups(fmt.group_size):
                turned = rows.turned(torch.cat([w[part] for w in weights]))
            q = gptq(turned, moment, fmt, global_scale=whole, scale_search=tried, columns=columns)
        else:
            q = quantize(rows.turned(weight[part]), fmt, global_scale=whole, scale_search=tried)
        for some in _parts(q.codes, _turned_at_once(weight)):
            made[part][some] = pack(q.codes[some], fmt)
        scales.append(q.scale)
        del q
    return Packed(made, torch.cat(scales), whole, branch)


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


def _rounded_at_once(weight: Weight) -> int:
    """Rows of a weight [N, K]: each has K code points, and a running error for each of some 512 sampled rows."""
    limit = _ROUNDED["cuda" if weight.device.type == "cuda" else "cpu"]
    return max(1, limit // (weight.shape[1] + 2048))


def _turned_at_once(matrix: Weight) -> int:
    return _TURNED["cuda" if matrix.device.type == "cuda" else "cpu"]


def _parts(weight: Weight, elements: int) -> Iterator[slice]:
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
