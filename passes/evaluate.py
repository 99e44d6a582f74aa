"""The true output error of a point's linears under an order of channels and a rotation.

    error(p, R) = ||X W^T - Q(X[:, p] R) Q(W[:, p] R)^T||^2 / ||X W^T||^2

X are sampled rows in two parts that share no row: what is fitted is measured on the first
part, what is reported and accepted on the second. One quantization of the weights serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pq_fx.errors import CalibrationError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import fake_quantize, nvfp4_global_scale, permute_rotate
from pq_fx.passes.choice import OwnSettings, Settings, settings_of
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import Point

# A later activation may be larger than any sampled one; nvfp4's tensor scale leaves this much room.
GLOBAL_SCALE_ROOM = 2.0
# Elements of a weight that are quantized at once: a CPU's cache, or enough to fill a GPU.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 1 << 22


_Found = TypeVar("_Found")


class Errors(NamedTuple):
    """Relative squared output errors by weight name, on the rows for fitting and on the others."""

    fit: dict[str, float]
    held: dict[str, float]


class Measured(NamedTuple):
    """Sampled rows of a point, fp32 [n, K], the first `fitted` of which are for fitting."""

    rows: Tensor
    fitted: int


class Slot:
    """Keeps the rows and weights of the point that was measured last, and lets go of those before: a residual
    stream's region has hundreds of points, which a device would have to hold beside the model."""

    def __init__(self) -> None:
        self._owner: PointErrors | None = None
        self._held: tuple[Measured, dict[str, Tensor]] | None = None

    def of(self, owner: PointErrors) -> tuple[Measured, dict[str, Tensor]]:
        """The rows and weights of `owner`."""
        if self._owner is not owner or self._held is None:
            self._held = None
            weights = {name: owner.weights[name] for name in owner.settings}
            self._held, self._owner = (owner.load(), weights), owner
        return self._held


class PointErrors:
    """Measures one point; results are kept, so equal candidates cost nothing.

    Args:
        load: gives the rows to measure on.
        names: of the linears' weights.
        weights: name -> float [N, K], as they stand in the model; rows and weights on one device.
            Asked for a weight when it is needed, so that a mapping may make it then.
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
        weights: Mapping[str, Tensor],
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
        self._known: dict[tuple[bytes, int, float], Errors] = {}

    def __call__(self, order: np.ndarray | None, rotation: int, clip: float = 1.0) -> Errors:
        """Errors with channel `order[k]` (int64 [K]) at position k, then rotated; None keeps.

        `clip` multiplies the largest magnitude of each group of X, from which its scale is made.
        """
        key = (b"" if order is None else order.tobytes(), rotation, clip)
        if key not in self._known:
            self._known[key] = self._measure(order, rotation, clip)
        return self._known[key]

    def original(self) -> Errors:
        """Errors in the model's own order, with all of the weights' errors."""
        if self.weight_part == 1.0:
            return self(None, 0)
        part, self.weight_part = self.weight_part, 1.0
        try:
            return self._measure(None, 0, 1.0)
        finally:
            self.weight_part = part

    def _measure(self, order: np.ndarray | None, rotation: int, clip: float) -> Errors:
        sample, weights = self._slot.of(self)
        perm = None if order is None else torch.from_numpy(order).to(sample.rows.device)
        x = permute_rotate(sample.rows, perm, rotation)
        if self.activation is not None:
            room = x.abs().amax() * GLOBAL_SCALE_ROOM
            ratio = None if clip == 1.0 else torch.tensor(clip, device=x.device)
            scale = _scale(room, self.activation)
            x = fake_quantize(x, self.activation, global_scale=scale, clip=ratio)
        errors = Errors({}, {})
        with exact_matmul():
            for name, weight in weights.items():
                lost, whole = self._sums(name, weight, sample, x, perm, rotation)
                parts = (lost / whole.where(whole > 0, torch.ones_like(whole))).tolist()
                errors.fit[name], errors.held[name] = parts
        return errors

    def _sums(
        self,
        name: str,
        weight: Tensor,
        sample: Measured,
        x: Tensor,
        perm: Tensor | None,
        rotation: int,
    ) -> tuple[Tensor, Tensor]:
        """Squared norms of error and output, fp64 [2]: fitted rows, other rows."""
        fmt, search = self.settings[name].weight, self.settings[name].weight_search
        elements = _CPU_ELEMENTS if weight.device.type == "cpu" else _CUDA_ELEMENTS
        chunks = weight.split(max(1, elements // max(1, weight.shape[1])))
        scale = None
        if fmt.two_level:
            turned = (permute_rotate(self._wide(w), perm, rotation) for w in chunks)
            scale = _scale(torch.stack([w.abs().amax() for w in turned]).amax(), fmt)
        lost = torch.zeros(2, dtype=torch.float64, device=x.device)
        whole = torch.zeros_like(lost)
        for chunk in chunks:
            w = self._wide(chunk)
            exact = permute_rotate(w, perm, rotation)
            q = fake_quantize(exact, fmt, global_scale=scale, scale_search=search)
            if self.weight_part != 1.0:
                q = torch.lerp(exact.to(q), q, self.weight_part)
            y = sample.rows @ w.T
            error = torch.addmm(y, x, q.T, alpha=-1)
            if self.center is not None:
                y = y + self.center @ w.T
            for sums, values in ((lost, error), (whole, y)):
                rows = values.square().sum(dim=1).double()
                sums += torch.stack([rows[: sample.fitted].sum(), rows[sample.fitted :].sum()])
        return lost, whole

    def _wide(self, weight: Tensor) -> Tensor:
        wide = weight.float()
        return wide if self.scale is None else wide * self.scale


def _scale(amax: Tensor, fmt: Format) -> Tensor | None:
    return nvfp4_global_scale(amax) if fmt.two_level else None


def halves(
    point: Point, moments: Mapping[str, Moments], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sampled rows for fitting and for acceptance, fp32 on `device`, none in both."""
    # Keys are random, so that every other row in their order is a random half.
    rows = moments[point.name].sample().to(device, torch.float32)
    return rows[0::2], rows[1::2]


def check(point: Point, moments: Mapping[str, Moments], weights: Mapping[str, Tensor]) -> None:
    """Raise CalibrationError unless the point was seen, and rows and weights are finite."""
    if point.name not in moments:
        raise CalibrationError(f"{point.name}: no statistics; calibrate the model first")
    moments[point.name].check(point.name)
    for name in point.linears:
        if not bool(torch.isfinite(torch.stack(torch.aminmax(weights[name]))).all()):
            raise CalibrationError(f"{name}: the weight holds NaN or infinity; skip it by a rule")


def measured(fit: Tensor, held: Tensor, settings: Settings) -> Measured:
    """The rows of `halves` that errors are measured on."""
    fit, held = fit[: settings.fit_rows], held[: settings.held_rows]
    return Measured(torch.cat([fit, held]), len(fit))


def least(plain: Errors, candidates: Iterable[tuple[_Found, Errors]]) -> _Found | None:
    """The candidate with the least error on the rows for fitting, the first of equals; None where that is not less
    than `plain`'s, or its error on the other rows is not."""
    best, lowest, held_out = None, sum(plain.fit.values()), 0.0
    for found, errors in candidates:
        if sum(errors.fit.values()) < lowest:
            best, lowest, held_out = found, sum(errors.fit.values()), sum(errors.held.values())
    return best if best is not None and held_out < sum(plain.held.values()) else None


def second_moments(
    point: Point, rows: Tensor, weights: Mapping[str, Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """E[x_i^2] and mean_n W[n, i]^2 over all rows of all linears, float64 [K]."""
    sums = sum(
        torch.linalg.vector_norm(weights[n], dim=0, dtype=torch.float32).double().square()
        for n in point.linears
    )
    assert isinstance(sums, Tensor)
    count = sum(weights[n].shape[0] for n in point.linears)
    return rows.square().mean(dim=0).double().cpu().numpy(), (sums / count).cpu().numpy()


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Real fp32 products on CUDA, whatever the user chose: TF32 would hide what is measured."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
