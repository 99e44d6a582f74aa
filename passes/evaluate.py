"""The true output error of a point's linears under an order of channels and a rotation.

    error(p, R) = ||X W^T - Q(X[:, p] R) Q(W[:, p] R)^T||^2 / ||X W^T||^2

X are sampled rows in two parts that share no row: what is fitted is measured on the first
part, what is reported and accepted on the second. One quantization of the weights serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pq_fx.errors import CalibrationError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import fake_quantize, nvfp4_global_scale, permute_rotate, rotate
from pq_fx.passes.choice import OwnSettings, Settings, settings_of
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import Point

# A later activation may be larger than any sampled one; nvfp4's tensor scale leaves this much room.
GLOBAL_SCALE_ROOM = 2.0
# Elements of a weight that are quantized at once: a CPU's cache, or enough to fill a GPU.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 1 << 23


_Found = TypeVar("_Found")


class Errors:
    """Relative squared output errors by weight name, measured when they are asked for: most candidates lose on the
    rows for fitting, and their errors on the others are never needed."""

    def __init__(self, measure: Callable[[bool], dict[str, float]]) -> None:
        self._measure = measure

    @cached_property
    def fit(self) -> dict[str, float]:
        """On the rows for fitting."""
        return self._measure(False)

    @cached_property
    def held(self) -> dict[str, float]:
        """On the others."""
        return self._measure(True)


class Measured(NamedTuple):
    """Sampled rows of a point, fp32 [n, K], the first `fitted` of which are for fitting."""

    rows: Tensor
    fitted: int


@dataclass
class Loaded:
    """What measuring a point needs: its rows and weights, and the outputs fp32 [n, N] by weight name."""

    sample: Measured
    weights: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Slot:
    """Keeps what the point that was measured last needs, and lets go of those before: a residual stream's region has
    hundreds of points, which a device would have to hold beside the model."""

    def __init__(self) -> None:
        self._owner: PointErrors | None = None
        self._loaded: Loaded | None = None

    def of(self, owner: PointErrors) -> Loaded:
        """What `owner` needs."""
        if self._owner is not owner or self._loaded is None:
            self._loaded = None
            weights = {name: owner.weights[name] for name in owner.settings}
            self._loaded, self._owner = Loaded(owner.load(), weights), owner
        return self._loaded


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
            self._known[key] = Errors(
                partial(self._measure, order, rotation, clip, self.weight_part)
            )
        return self._known[key]

    def original(self) -> Errors:
        """Errors in the model's own order, with all of the weights' errors."""
        if self.weight_part == 1.0:
            return self(None, 0)
        return Errors(partial(self._measure, None, 0, 1.0, 1.0))

    def _measure(
        self,
        order: np.ndarray | None,
        rotation: int,
        clip: float,
        weight_part: float,
        held: bool,
    ) -> dict[str, float]:
        loaded = self._slot.of(self)
        sample = loaded.sample
        perm = None if order is None else torch.from_numpy(order).to(sample.rows.device)
        part = slice(sample.fitted, None) if held else slice(sample.fitted)
        errors = {}
        with exact_matmul():
            x = _turned(sample.rows, perm, rotation)
            if self.activation is not None:
                scale = _scale(x.abs().amax() * GLOBAL_SCALE_ROOM, self.activation)
                ratio = None if clip == 1.0 else torch.tensor(clip, device=x.device)
                x = fake_quantize(x[part], self.activation, global_scale=scale, clip=ratio)
            else:
                x = x[part]
            for name, weight in loaded.weights.items():
                if name not in loaded.outputs:
                    loaded.outputs[name] = self._outputs(sample.rows, weight)
                y = loaded.outputs[name][part]
                lost = self._lost(name, weight, x, y, perm, rotation, weight_part)
                if self.center is not None:
                    y = y + torch.cat([self.center @ self._wide(w).T for w in _chunks(weight)])
                whole = float(y.square().sum(dim=1).double().sum())
                errors[name] = float(lost) / whole if whole > 0 else float(lost)
        return errors

    def _outputs(self, rows: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rows @ self._wide(chunk).T for chunk in _chunks(weight)], dim=1)

    def _lost(
        self,
        name: str,
        weight: Tensor,
        x: Tensor,
        y: Tensor,
        perm: Tensor | None,
        rotation: int,
        weight_part: float,
    ) -> Tensor:
        """Squared norm of the error of outputs y [n, N], fp64 []."""
        fmt, search = self.settings[name].weight, self.settings[name].weight_search
        chunks = _chunks(weight)
        scale = None
        if fmt.two_level:
            turned = (_turned(self._wide(w), perm, rotation) for w in chunks)
            scale = _scale(torch.stack([w.abs().amax() for w in turned]).amax(), fmt)
        lost = torch.zeros((), dtype=torch.float64, device=x.device)
        for chunk, wanted in zip(chunks, y.split([len(c) for c in chunks], dim=1), strict=True):
            exact = _turned(self._wide(chunk), perm, rotation)
            q = fake_quantize(exact, fmt, global_scale=scale, scale_search=search)
            if weight_part != 1.0:
                q = torch.lerp(exact, q, weight_part)
            error = torch.addmm(wanted, x, q.T, alpha=-1)
            lost += error.square().sum(dim=1).double().sum()
        return lost

    def _wide(self, weight: Tensor) -> Tensor:
        wide = weight.float()
        return wide if self.scale is None else wide * self.scale


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    elements = _CPU_ELEMENTS if weight.device.type == "cpu" else _CUDA_ELEMENTS
    return weight.split(max(1, elements // max(1, weight.shape[1])))


def _turned(x: Tensor, perm: Tensor | None, rotation: int) -> Tensor:
    """`permute_rotate` to within rounding: on a GPU one product with the Hadamard matrix instead of 28 launches."""
    if rotation == 0 or x.device.type == "cpu":
        return permute_rotate(x, perm, rotation)
    return rotate_by_product(permute_rotate(x, perm, 0), rotation)


def rotate_by_product(x: Tensor, rotation: int) -> Tensor:
    """`rotate` of x [..., channels] in blocks of `rotation` channels, as a product of fp32 matrices."""
    matrix = rotate(torch.eye(rotation, device=x.device), rotation)
    return (x.reshape(-1, rotation) @ matrix).reshape(x.shape)


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
