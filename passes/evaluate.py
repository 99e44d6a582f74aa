"""The true output error of a point's linears under an order of channels and a rotation.

    error(p, R) = ||X W^T - Q(X[:, p] R) Q(W[:, p] R)^T||^2 / ||X W^T||^2

X are sampled rows in two parts that share no row: what is fitted is measured on the first
part, what is reported and accepted on the second. One quantization of the weights serves both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pq_fx.kernels.reference import fake_quantize
from pq_fx.passes.choice import OwnSettings, settings_of
from pq_fx.passes.sampled import Measured
from pq_fx.passes.turned import (
    Matrix,
    chunks,
    elements,
    exact_matmul,
    slices,
    turned,
    whole_scale,
)

# A later activation may be larger than any sampled one; nvfp4's tensor scale leaves this much room.
GLOBAL_SCALE_ROOM = 2.0
_Found = TypeVar("_Found")
# Order, rotation, clip, the part of the weights' errors, whether on the held-out rows.
_Key = tuple[Any, ...]


class Errors(NamedTuple):
    """Relative squared output errors by weight name, measured when they are asked for: most candidates lose on the
    rows for fitting, and their errors on the others are never needed."""

    measure: Callable[[bool], dict[str, float]]  # whether on the rows that were held out

    @property
    def fit(self) -> dict[str, float]:
        """On the rows for fitting."""
        return self.measure(False)

    @property
    def held(self) -> dict[str, float]:
        """On the others."""
        return self.measure(True)


@dataclass
class Loaded:
    """What measuring a point needs: its rows, and of the part that was measured on last the outputs fp32 [n, N] by
    weight name. Their squared norms, which errors are relative to, are kept for both parts."""

    sample: Measured
    held: bool = False
    outputs: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[tuple[str, bool], float] = field(default_factory=dict)


class Slot:
    """Keeps what the point that was measured last needs, and lets go of those before: a residual stream's region has
    hundreds of points, which a device would have to hold beside the model."""

    def __init__(self) -> None:
        self._owner: weakref.ref[PointErrors] | None = None  # which holds this slot
        self._loaded: Loaded | None = None

    def of(self, owner: PointErrors) -> Loaded:
        """What `owner` needs."""
        if self._loaded is None or self._owner is None or self._owner() is not owner:
            self._loaded = None
            self._loaded, self._owner = Loaded(owner.load()), weakref.ref(owner)
        return self._loaded


class PointErrors:
    """Measures one point; results are kept, so equal candidates cost nothing.

    Args:
        load: gives the rows to measure on.
        names: of the linears' weights.
        weights: name -> float [N, K], as they stand in the model; rows and weights on one device.
            Asked for a weight when it is needed, and for some of its rows at a time, so that they may be made then.
        settings: formats and the search of the weights' scales; X is in the first linear's
            `activation` format.
        one_row: X stays as it is.
        scale: fp32 [K] that multiplies the weights' columns.
        center: fp32 [K] that was taken off the rows (passes/balance.py): its share belongs to the
            outputs that errors are relative to.
        slot: shared by the points of a region; None: rows and weights are kept while this is.
    """

    def __init__(
        self,
        load: Callable[[], Measured],
        names: Iterable[str],
        weights: Mapping[str, Matrix],
        settings: OwnSettings,
        *,
        one_row: bool = False,
        scale: Tensor | None = None,
        center: Tensor | None = None,
        slot: Slot | None = None,
    ) -> None:
        self.load = load
        self.weights = weights
        self.settings = {name: settings_of(settings, name) for name in names}
        first = self.settings[next(iter(self.settings))]
        self.activation = None if one_row else first.activation
        self.weight_part = first.weight_part
        self.scale = scale
        self.center = center
        self._slot = Slot() if slot is None else slot
        # Nothing that holds this object, or rows would live until the garbage collector finds them.
        self._found: dict[_Key, dict[str, float]] = {}

    def __call__(self, order: np.ndarray | None, rotation: int, clip: float = 1.0) -> Errors:
        """Errors with channel `order[k]` (int64 [K]) at position k, then rotated; None keeps.

        `clip` multiplies the largest magnitude of each group of X, from which its scale is made.
        """
        return Errors(partial(self._known, order, rotation, clip, self.weight_part))

    def original(self) -> Errors:
        """Errors in the model's own order, with all of the weights' errors."""
        return Errors(partial(self._known, None, 0, 1.0, 1.0))

    def with_clips(self, order: np.ndarray | None, rotation: int, clips: Sequence[float]) -> None:
        """Measure several clip ratios on the rows for fitting: they share one quantization of the weights."""
        keys = {c: _key(order, rotation, c, self.weight_part, False) for c in clips}
        new = [c for c in clips if keys[c] not in self._found]
        if not new:
            return
        sample = self._slot.of(self).sample
        # All of their rows are held at once.
        step = max(1, elements(sample.rows) // max(1, sample.rows[: sample.fitted].numel()))
        for start in range(0, len(new), step):
            some = new[start : start + step]
            found = self._measure(order, rotation, some, self.weight_part, False)
            self._found |= {keys[c]: errors for c, errors in zip(some, found, strict=True)}

    def _known(
        self,
        order: np.ndarray | None,
        rotation: int,
        clip: float,
        weight_part: float,
        held: bool,
    ) -> dict[str, float]:
        key = _key(order, rotation, clip, weight_part, held)
        if key not in self._found:
            self._found[key] = self._measure(order, rotation, (clip,), weight_part, held)[0]
        return self._found[key]

    def _measure(
        self,
        order: np.ndarray | None,
        rotation: int,
        clips: Sequence[float],
        weight_part: float,
        held: bool,
    ) -> list[dict[str, float]]:
        """Errors by weight name, for each clip ratio."""
        loaded = self._slot.of(self)
        rows, fitted = loaded.sample
        perm = None if order is None else torch.from_numpy(order).to(rows.device)
        part = slice(fitted, None) if held else slice(fitted)
        lost, sizes = [], []
        if held != loaded.held:
            loaded.outputs.clear()
            loaded.held = held
        with exact_matmul():
            xs = self._seen(rows, part, perm, rotation, clips)
            for name in self.settings:
                weight = self.weights[name]
                if name not in loaded.outputs:
                    y = loaded.outputs[name] = self._outputs(rows[part].float(), weight)
                    loaded.sizes[name, held] = self._size(y, weight)
                y = loaded.outputs[name]
                lost.append(self._lost(name, weight, xs, y, perm, rotation, weight_part))
                sizes.append(loaded.sizes[name, held] or 1.0)
        found = torch.stack(lost, dim=1).tolist()
        return [
            {
                name: error / size
                for name, error, size in zip(self.settings, each, sizes, strict=True)
            }
            for each in found
        ]

    def _seen(
        self,
        rows: Tensor,
        part: slice,
        perm: Tensor | None,
        rotation: int,
        clips: Sequence[float],
    ) -> list[Tensor]:
        """A part of the rows as the linears see them, fp32 [n, K], for each clip ratio."""
        fmt = self.activation
        if fmt is None:
            return [turned(rows[part].float(), perm, rotation)] * len(clips)
        whole = (turned(some.float(), perm, rotation) for some in chunks(rows))
        scale = whole_scale(whole, fmt, GLOBAL_SCALE_ROOM)
        found: list[list[Tensor]] = [[] for _ in clips]
        for some in chunks(rows[part]):
            x = turned(some.float(), perm, rotation)
            for clip, made in zip(clips, found, strict=True):
                ratio = None if clip == 1.0 else torch.tensor(clip, device=x.device)
                made.append(fake_quantize(x, fmt, global_scale=scale, clip=ratio))
        return [torch.cat(made) for made in found]

    def _outputs(self, rows: Tensor, weight: Matrix) -> Tensor:
        outputs = rows.new_empty(len(rows), len(weight))
        for some in slices(weight):
            outputs[:, some] = rows @ self._wide(weight[some]).T
        return outputs

    def _size(self, outputs: Tensor, weight: Matrix) -> float:
        """The squared norm of what outputs are without a center."""
        size = torch.zeros((), dtype=torch.float64, device=outputs.device)
        for some in slices(weight):
            y = outputs[:, some]
            if self.center is not None:
                y = y + self.center @ self._wide(weight[some]).T
            size += y.square().sum(dim=1).double().sum()
        return size.item()

    def _lost(
        self,
        name: str,
        weight: Matrix,
        xs: Sequence[Tensor],
        y: Tensor,
        perm: Tensor | None,
        rotation: int,
        weight_part: float,
    ) -> Tensor:
        """Squared norms of the errors of outputs y [n, N] for each of `xs`, fp64 [len(xs)]."""
        fmt, search = self.settings[name].weight, self.settings[name].weight_search
        parts = slices(weight)
        scale = whole_scale((turned(self._wide(weight[p]), perm, rotation) for p in parts), fmt)
        lost = torch.zeros(len(xs), dtype=torch.float64, device=y.device)
        for some in parts:
            exact = turned(self._wide(weight[some]), perm, rotation)
            q = fake_quantize(exact, fmt, global_scale=scale, scale_search=search)
            if weight_part != 1.0:
                q = torch.lerp(exact, q, weight_part)
            for i, x in enumerate(xs):
                error = torch.addmm(y[:, some], x, q.T, alpha=-1)
                lost[i] += error.square_().sum(dim=1).double().sum()
            del exact, q  # before the next ones are made
        return lost

    def _wide(self, weight: Tensor) -> Tensor:
        wide = weight.float()
        return wide if self.scale is None else wide * self.scale


def _key(order: np.ndarray | None, *others: Any) -> _Key:
    return b"" if order is None else order.tobytes(), *others


def least(plain: Errors, candidates: Iterable[tuple[_Found, Errors]]) -> _Found | None:
    """The candidate with the least error on the rows for fitting, the first of equals; None where that is not less
    than `plain`'s, or its error on the other rows is not."""
    best, lowest, held_out = None, sum(plain.fit.values()), 0.0
    for found, errors in candidates:
        if sum(errors.fit.values()) < lowest:
            best, lowest, held_out = found, sum(errors.fit.values()), sum(errors.held.values())
    return best if best is not None and held_out < sum(plain.held.values()) else None
