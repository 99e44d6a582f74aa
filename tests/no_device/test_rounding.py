"""GPTQ against a column-by-column float64 computation, and on rows that it never saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pq_fx.errors import CalibrationError, FormatError
from pq_fx.kernels.formats import FORMAT_NAMES, Format, get_format
from pq_fx.kernels.reference import Quantized, dequantize, fake_quantize, permute_rotate, quantize
from pq_fx.passes.rounding import gptq, second_moment

K, N = 192, 37


def rows(seed: int, count: int, channels: int = K) -> torch.Tensor:
    """Correlated channels of unlike size; the mixture is the same for every seed."""
    mix = np.random.default_rng(99)
    low = mix.standard_normal((12, channels)) * np.exp(0.8 * mix.standard_normal(channels))
    g = np.random.default_rng(seed)
    x = g.standard_normal((count, 12)) @ low + 0.5 * g.standard_normal((count, channels))
    return torch.from_numpy(x).float()


def weight(seed: int, channels: int = K) -> torch.Tensor:
    return torch.randn(N, channels, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, w: torch.Tensor, q: Quantized, fmt: Format) -> float:
    y = x.double() @ w.double().T
    return float((y - x.double() @ dequantize(q, fmt).double().T).square().sum() / y.square().sum())


def brute_force(
    w: np.ndarray, h: np.ndarray, order: np.ndarray, group: int, full: bool = False
) -> np.ndarray:
    """int4 (full: int4f) GPTQ as the optimal-brain update states it: re-invert what is left at every column."""
    w = w.astype(np.float64).copy()
    out = np.zeros_like(w)
    scale = np.ones(len(w))
    for step, j in enumerate(order):
        if step % group == 0:
            part = w[:, j // group * group : j // group * group + group].astype(np.float32)
            largest = np.abs(part).max(1) / np.float32(7)
            if full:  # the element of largest magnitude to -8
                largest = part[np.arange(len(w)), np.abs(part).argmax(1)] / np.float32(-8)
            scale = torch.from_numpy(largest).bfloat16().double().numpy()
        out[:, j] = np.clip(np.rint(w[:, j] / scale), -7 - full, 7) * scale
        left = order[step:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        w[:, left] -= np.outer((w[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out


@pytest.mark.parametrize(
    "name, channels, count",
    [("int4", 48, 70), ("int4f", 48, 11), ("int4", 48, 11), ("int4", 48, 1), ("int4f", 272, 40)],
)
@pytest.mark.parametrize("by_size", [True, False])
def test_equals_brute_force(by_size: bool, name: str, channels: int, count: int) -> None:
    """More rows than channels, fewer, one; and several blocks of columns, the last of which is short."""
    fmt = get_format(name, 16)
    x, w = rows(1, count, channels), weight(1, channels)
    moment = second_moment(x, group=16, ridge=0.05, by_size=by_size)
    h = (x.T.double() @ x.double() / count).numpy()
    size = np.diag(h)
    order = moment.order.numpy()
    assert sorted(order) == list(range(channels))
    if by_size:
        groups = size.reshape(-1, 16).sum(1)
        assert list(order[::16] // 16) == list(np.argsort(-groups))
        assert all((np.diff(size[part]) <= 0).all() for part in order.reshape(-1, 16))
    else:
        assert (order == np.arange(channels)).all()
    h += 0.05 * size.mean() * np.eye(channels)
    got = dequantize(gptq(w, moment, fmt), fmt).numpy()
    wanted = brute_force(w.numpy(), h, order, 16, fmt.full_range)
    # fp32 and float64 may round a tie differently, which then spreads: rows that differ are few.
    same = np.isclose(got, wanted, rtol=1e-5, atol=1e-6).all(1)
    assert same.mean() > 0.9


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("rotation", [0, 16])
def test_less_output_error_than_nearest_on_other_rows(name: str, rotation: int) -> None:
    fmt = get_format(name)
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(5))
    x, test = (permute_rotate(rows(s, 500), perm, rotation) for s in (2, 3))
    w = permute_rotate(weight(2), perm, rotation)
    scaled = {} if not fmt.two_level else {"global_scale": torch.tensor(0.01)}
    xq, tq = (fake_quantize(v, fmt, **scaled) for v in (x, test))
    moment = second_moment(xq, group=fmt.group_size)
    q = gptq(w, moment, fmt)
    nearest = quantize(w, fmt, global_scale=q.global_scale)
    assert q.codes.dtype == torch.uint8 and q.scale.dtype == nearest.scale.dtype
    assert q.codes.shape == nearest.codes.shape and q.scale.shape == nearest.scale.shape
    assert error(tq, w, q, fmt) < 0.75 * error(tq, w, nearest, fmt)
    # And further from the weights themselves: it is the output that was fitted.
    assert (dequantize(q, fmt) - w).norm() > (dequantize(nearest, fmt) - w).norm()


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_independent_channels_are_rounded_to_nearest(name: str) -> None:
    fmt, w = get_format(name), weight(3)
    moment = second_moment(torch.eye(K), group=fmt.group_size)
    q = gptq(w, moment, fmt)
    nearest = quantize(w, fmt, global_scale=q.global_scale)
    assert torch.equal(q.scale.view(torch.uint8), nearest.scale.view(torch.uint8))
    different = dequantize(q, fmt) != dequantize(nearest, fmt)
    assert different.float().mean() < 0.001  # ties


def test_scale_search_lowers_the_error() -> None:
    fmt, x, w = get_format("int3"), rows(4, 600), weight(4)
    moment = second_moment(x, group=64)
    ratios = tuple(1 - 0.03 * i for i in range(16))
    searched = error(rows(5, 400), w, gptq(w, moment, fmt, scale_search=ratios), fmt)
    assert searched < error(rows(5, 400), w, gptq(w, moment, fmt), fmt)


@pytest.mark.parametrize("name", ["int4", "int3", "int4f", "int3f", "nvfp4", "mxfp4", "int8"])
def test_dead_channels_few_rows_and_zero_weights(name: str) -> None:
    fmt = get_format(name)
    x, w = rows(6, 5), weight(6)
    x[:, 10:90] = 0
    w[:, 60:140] = 0
    w[3] = 0
    value = dequantize(gptq(w, second_moment(x, group=fmt.group_size), fmt), fmt)
    assert torch.isfinite(value).all() and not value[3].any()
    nothing = dequantize(gptq(w, second_moment(x * 0, group=fmt.group_size), fmt), fmt)
    assert torch.isfinite(nothing).all()


def test_inputs_are_not_changed_and_half_precision_works() -> None:
    fmt, x, w = get_format("int4", 32), rows(7, 300), weight(7).bfloat16()
    before = w.clone()
    moment = second_moment(x.half(), group=32)
    a, b = gptq(w, moment, fmt), gptq(w.float(), moment, fmt)
    assert torch.equal(w, before)
    assert torch.equal(a.codes, b.codes)


def test_columns_that_are_made_when_their_turn_comes() -> None:
    class Made:
        def __init__(self, weight: torch.Tensor) -> None:
            self.weight, self.shape, self.device = weight, weight.shape, weight.device
            self.most = 0

        def columns(self, index: torch.Tensor) -> torch.Tensor:
            self.most = max(self.most, len(index))
            return self.weight[:, index]

    fmt, x = get_format("int4f", 32), torch.randn(300, 1152) * torch.rand(1152)
    made = Made(torch.randn(40, 1152))
    moment = second_moment(x, group=32)
    a, b = gptq(made, moment, fmt), gptq(made.weight, moment, fmt)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    assert made.most < 1152  # not the whole matrix


def test_errors() -> None:
    fmt, x, w = get_format("int4", 32), rows(8, 40), weight(8)
    with pytest.raises(CalibrationError, match="0 rows"):
        second_moment(x[:0], group=32)
    with pytest.raises(CalibrationError, match="not finite"):
        second_moment(torch.where(x > 3, torch.nan, x), group=32)
    with pytest.raises(CalibrationError, match="192 channels in groups of 64, found 192 in .* 32"):
        gptq(w, second_moment(x, group=32), get_format("int4", 64))
    with pytest.raises(FormatError, match="not a multiple"):
        gptq(w[:, :50], second_moment(x, group=32), fmt)
