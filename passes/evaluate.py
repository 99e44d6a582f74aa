"""The true output error of a point's linears under an order of channels and a rotation.

    error(p, R) = ||X W^T - Q(X[:, p] R) Q(W[:, p] R)^T||^2 / ||X W^T||^2

X are sampled rows in two parts that share no row: what is fitted is measured on the first
part, what is reported and accepted on the second. One quantization of the weights serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import fake_quantize, nvfp4_global_scale, permute_rotate

# A later activation may be larger than any sampled one; nvfp4's tensor scale leaves this much room.
GLOBAL_SCALE_ROOM = 2.0
# Elements of a weight that are quantized at once: a CPU's cache, or enough to fill a GPU.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 1 << 25


class Errors(NamedTuple):
    """Relative squared output errors by weight name, on the rows for fitting and on the others."""

    fit: dict[str, float]
    held: dict[str, float]


class PointErrors:
    """Measures one point; results are kept, so equal candidates cost nothing.

    Args:
        rows: fp32 [n, K], the first `fitted` of which are for fitting.
        weights: name -> float [N, K], as they stand in the model; rows and weights on one device.
        activation: format of X, or None: X stays as it is.
    """

    def __init__(
        self,
        rows: Tensor,
        fitted: int,
        weights: Mapping[str, Tensor],
        weight_format: Format,
        activation: Format | None,
    ) -> None:
        self.rows = rows
        self.fitted = fitted
        self.weights = weights
        self.weight_format = weight_format
        self.activation = activation
        self._known: dict[tuple[bytes, int], Errors] = {}

    def __call__(self, order: np.ndarray | None, rotation: int) -> Errors:
        """Errors with channel `order[k]` (int64 [K]) at position k, then rotated; None keeps."""
        key = (b"" if order is None else order.tobytes(), rotation)
        if key not in self._known:
            self._known[key] = self._measure(order, rotation)
        return self._known[key]

    def _measure(self, order: np.ndarray | None, rotation: int) -> Errors:
        perm = None if order is None else torch.from_numpy(order).to(self.rows.device)
        x = permute_rotate(self.rows, perm, rotation)
        if self.activation is not None:
            room = x.abs().amax() * GLOBAL_SCALE_ROOM
            x = fake_quantize(x, self.activation, global_scale=_scale(room, self.activation))
        errors = Errors({}, {})
        with exact_matmul():
            for name, weight in self.weights.items():
                lost, whole = self._sums(x, weight, perm, rotation)
                parts = (lost / whole.where(whole > 0, torch.ones_like(whole))).tolist()
                errors.fit[name], errors.held[name] = parts
        return errors

    def _sums(
        self, x: Tensor, weight: Tensor, perm: Tensor | None, rotation: int
    ) -> tuple[Tensor, Tensor]:
        """Squared norms of error and output, fp64 [2]: fitted rows, other rows."""
        fmt = self.weight_format
        elements = _CPU_ELEMENTS if weight.device.type == "cpu" else _CUDA_ELEMENTS
        chunks = weight.split(max(1, elements // max(1, weight.shape[1])))
        scale = None
        if fmt.two_level and rotation:
            tops = [permute_rotate(w.float(), perm, rotation).abs().amax() for w in chunks]
            scale = _scale(torch.stack(tops).amax(), fmt)
        elif fmt.two_level:
            scale = _scale(weight.abs().amax(), fmt)
        lost = torch.zeros(2, dtype=torch.float64, device=x.device)
        whole = torch.zeros_like(lost)
        for chunk in chunks:
            w = chunk.float()
            q = fake_quantize(permute_rotate(w, perm, rotation), fmt, global_scale=scale)
            y = self.rows @ w.T
            error = torch.addmm(y, x, q.T, alpha=-1)
            for sums, values in ((lost, error), (whole, y)):
                rows = values.square().sum(dim=1).double()
                sums += torch.stack([rows[: self.fitted].sum(), rows[self.fitted :].sum()])
        return lost, whole


def _scale(amax: Tensor, fmt: Format) -> Tensor | None:
    return nvfp4_global_scale(amax) if fmt.two_level else None


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
