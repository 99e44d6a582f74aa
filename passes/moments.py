"""Calibration statistics of a point: running moments and a uniform sample of rows.

Everything adds up: over calls, over a run that was cut off and goes on, and over processes (`Moments.merge`), because
the sample is a bottom-k sketch: every row ever seen draws a uniform random key, and the rows with the R smallest keys
stay. The union of two sketches is the sketch of the union (Cohen and Kaplan, "Summarizing data using bottom-k
sketches", PODC 2007), so the sample is uniform over all rows of all calls, hence over all timesteps, however many
there are. `observe` (passes/observe.py) updates them in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pq_fx.errors import CalibrationError


@dataclass
class Moments:
    """Statistics of one point with K channels, sample of R rows.

    Only the sums are on the model's device. `count`, `calls` and `keys` stay on the CPU, where keys
    are drawn, and so do `rows`, which for all points together are gigabytes (FLUX.1: 6). An empty
    slot of the sample has key +inf.
    """

    count: Tensor  # int64 [1], rows seen
    calls: Tensor  # int64 [1], updates done; with the seed it determines the next keys
    sum_squares: Tensor  # float64 [K]
    amax: Tensor  # float32 [K], largest magnitude
    keys: Tensor  # float64 [R]
    rows: Tensor  # float32 (or the activation's dtype) [R, K]

    @classmethod
    def create(
        cls,
        channels: int,
        rows: int = 1024,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Moments:
        """Empty statistics, sums on `device`; `dtype` is how sampled rows are stored (the
        activation's own loses nothing)."""
        return cls(
            count=torch.zeros(1, dtype=torch.int64),
            calls=torch.zeros(1, dtype=torch.int64),
            sum_squares=torch.zeros(channels, dtype=torch.float64, device=device),
            amax=torch.zeros(channels, dtype=torch.float32, device=device),
            keys=torch.full((rows,), torch.inf, dtype=torch.float64),
            rows=torch.zeros(rows, channels, dtype=dtype),
        )

    def merge(self, other: Moments) -> Moments:
        """The statistics of both, as new tensors on this one's device; associative.

        Raises CalibrationError when the two do not have the same channels and sample size.
        """
        if self.rows.shape != other.rows.shape:
            raise CalibrationError(
                f"cannot merge statistics of shape {list(other.rows.shape)} into "
                f"{list(self.rows.shape)} (rows kept, channels); they belong to "
                "another point or another setting"
            )
        device = self.device
        keys, order = torch.cat([self.keys, other.keys]).sort(stable=True)
        size = self.keys.numel()
        rows = torch.cat([self.rows, other.rows.to(self.rows)])[order[:size]]
        return Moments(
            count=self.count + other.count,
            calls=self.calls + other.calls,
            sum_squares=self.sum_squares + other.sum_squares.to(device),
            amax=torch.maximum(self.amax, other.amax.to(device)),
            keys=keys[:size],
            rows=rows,
        )

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self.sum_squares.device

    @property
    def mean_square(self) -> Tensor:
        """E[x_i^2] over all rows seen, float64 [K]; zero when there were none."""
        return self.sum_squares / self.count.clamp(min=1).to(self.sum_squares.device)

    def sample(self) -> Tensor:
        """The rows held [n <= R, K], in order of their keys: every prefix is a uniform sample
        too."""
        order = self.keys.argsort(stable=True)
        held = int(torch.isfinite(self.keys).sum())
        return self.rows[order[:held]]

    def check(self, name: str) -> None:
        """Raise CalibrationError, naming the point, when no rows were seen or some were not
        finite."""
        if int(self.count) == 0:
            raise CalibrationError(
                f"{name}: no activation was seen; run the model inside calibrate(), "
                "or skip this layer by a rule"
            )
        bad = int((~torch.isfinite(self.amax) | ~torch.isfinite(self.sum_squares)).sum())
        if bad:
            raise CalibrationError(
                f"{name}: {bad} of {self.amax.numel()} channels held NaN or infinity during "
                "calibration; find the input that causes it (fp16 overflow?), or skip this layer "
                "by a rule"
            )

    def to(self, device: torch.device | str) -> Moments:
        """The same statistics with the sums on `device`."""
        return replace(self, sum_squares=self.sum_squares.to(device), amax=self.amax.to(device))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The six tensors in the order in which `pq::observe` and the observed graph take them."""
        return self.count, self.calls, self.sum_squares, self.amax, self.keys, self.rows

    def state(self) -> dict[str, Tensor]:
        """Field name -> tensor (not copied), for saving."""
        return dict(zip(FIELDS, self.tensors(), strict=True))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """Inverse of `state`. Raises CalibrationError when fields are missing or do not fit each
        other."""
        missing = [name for name in FIELDS if name not in state]
        if missing:
            raise CalibrationError(
                f"saved statistics lack {', '.join(missing)}; they are damaged or older"
            )
        moments = cls(**{name: state[name] for name in FIELDS})
        rows = moments.rows
        if rows.dim() != 2 or not rows.is_floating_point():
            raise CalibrationError(
                f"saved rows are {rows.dtype} {list(rows.shape)}; calibrate again"
            )
        held, channels = rows.shape
        expected = {
            "count": (torch.int64, (1,)),
            "calls": (torch.int64, (1,)),
            "sum_squares": (torch.float64, (channels,)),
            "amax": (torch.float32, (channels,)),
            "keys": (torch.float64, (held,)),
        }
        for name, (dtype, shape) in expected.items():
            value = state[name]
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise CalibrationError(
                    f"saved statistics do not fit each other: with rows {[held, channels]}, {name} is "
                    f"{value.dtype} {list(value.shape)} and not {dtype} {list(shape)}; calibrate again"
                )
            if bool((value < 0).any()) or (name == "keys" and bool(value.isnan().any())):
                raise CalibrationError(f"saved {name} holds what no call counts; calibrate again")
        return moments


FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Moments))
