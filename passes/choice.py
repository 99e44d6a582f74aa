"""What a region's choice is made by and what it says: settings, and the fold, gathers and rotations chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pq_fx.kernels.formats import Format


@dataclass(frozen=True)
class Settings:
    """How regions are treated.

    Attributes:
        weight: format of the weights.
        activation: format of the points' tensors; None: they stay in 16 bits.
        sort: try orders by the joint second moment.
        rotate: try block-Hadamard rotations.
        alphas: exponents of the joint second moment that are tried.
        tau: a choice is accepted when it lowers the error on held-out rows by more than this part.
        gather_margin: a gather must lower the error by more than this part of the best error that
            needs none.
        weight_search: ratios that are tried for every scale of the weights, as at packing.
        weight_part: what remains of the weights' rounding errors (an amplitude, 1 = all), where
            error-compensating rounding follows: candidates are compared by what will be left.
        half_rotate: try rotations of half a group too.
        refine: swaps that every group tries on top of the best order; 0 = none.
        clips: ratios of which each point's quantizer gets the best one, a constant that its scales
            are made smaller (or larger) by. Rotated channels are bell-shaped and rarely reach
            their largest magnitude, so that finer steps pay for clipping.
        rotations: points (by name) whose rotation is settled; the others' is chosen.
        centers: fp32 [K] by point name: what was taken off its rows before (passes/balance.py).
        seed: of the swaps.
        fit_rows, held_rows: at most so many sampled rows measure errors in each half.
    """

    weight: Format
    activation: Format | None
    sort: bool = True
    rotate: bool = True
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    tau: float = 0.0
    gather_margin: float = 0.05
    weight_search: tuple[float, ...] = ()
    weight_part: float = 1.0
    half_rotate: bool = False
    refine: int = 0
    clips: tuple[float, ...] = ()
    rotations: Mapping[str, int] = field(default_factory=dict)
    centers: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    fit_rows: int = 256
    held_rows: int = 256


# One for all linears, or each linear's own by weight name: formats may differ inside a region (rules,
# a budget, channels that need a smaller group). Linears of one point share `activation`.
OwnSettings = Settings | Mapping[str, Settings]


def settings_of(settings: OwnSettings, name: str) -> Settings:
    """The settings of the linear with this weight name."""
    return settings if isinstance(settings, Settings) else settings[name]


@dataclass
class PointChoice:
    """What happens to a point's tensor before it is quantized.

    `perm` (int64 [K]) is gathered at run time, of channels that a fold may have moved already;
    None = none. `rotation` is the size of the blocks rotated then, 0 = none. `clip` multiplies
    the largest magnitude of each group before its scale is computed.
    """

    perm: np.ndarray | None
    rotation: int
    clip: float = 1.0


@dataclass
class LinearError:
    """Relative squared output error on held-out rows: of the model's own order, and as chosen."""

    before: float
    after: float


@dataclass
class RegionChoice:
    """What was chosen for a region; all dicts are by point name but `errors`, by weight name."""

    fold: np.ndarray | None  # int64 [C], for fold.fold_tensors
    points: dict[str, PointChoice]
    absorb: dict[str, str]  # "fold" | "stream" | "norm" | "quantize" | "none"
    alpha: float | None
    accepted: bool
    rotation: int
    errors: dict[str, LinearError]
    reason: str
