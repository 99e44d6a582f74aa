"""Choices on planted data, and reported errors against an independent float64 computation."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from pq_fx.errors import CalibrationError, GraphError
from pq_fx.kernels.formats import Format, get_format
from pq_fx.kernels.reference import rotate
from pq_fx.passes import turned
from pq_fx.passes.candidates import regroups, rotation_size
from pq_fx.passes.choose import RegionChoice, Settings, choose
from pq_fx.passes.evaluate import PointErrors
from pq_fx.passes.fold import axis_index, fold_tensors
from pq_fx.passes.moments import Moments
from pq_fx.passes.observe import observe
from pq_fx.passes.regions import FoldAxis, Point, Region
from pq_fx.passes.sampled import Measured
from pq_fx.passes.turned import rotate_by_product

K = 192
INT4 = get_format("int4", 64)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def one_point(
    channels: int = K, fold: bool = True, one_row: bool = False, linears: tuple[str, ...] = ("w",)
) -> Region:
    blocks = np.zeros(channels, np.int64) if fold else np.full(channels, -1, np.int64)
    point = Point(linears[0], linears, channels, "norm", one_row)
    return Region(linears[0], (point,), blocks, {linears[0]: np.arange(channels)})


def moments_of(x: np.ndarray) -> Moments:
    moments = Moments.create(x.shape[1], 1024)
    observe(torch.from_numpy(x).float(), *moments.tensors(), 0)
    return moments


def planted(seed: int, rows: int = 500, channels: int = K) -> tuple[np.ndarray, torch.Tensor]:
    """Every 9th channel is 10 times as large in x, and its weights small, as in real models."""
    g = rng(seed)
    x, w = g.standard_normal((rows, channels)), g.standard_normal((45, channels))
    x[:, ::9] *= 10
    w[:, ::9] *= 0.3
    return x, torch.from_numpy(w).float()


def settings(fmt: Format = INT4, **changes: object) -> Settings:
    given = {"weight": fmt, "activation": fmt, "rotate": False, **changes}
    return Settings(**given)  # type: ignore[arg-type]


def order_of(region: Region, choice: RegionChoice, point: str) -> np.ndarray:
    """The model's column at each position of the quantized linear, as an integrator applies it."""
    order = np.arange(len(region.columns[point]))
    if choice.fold is not None:
        order = axis_index(region.columns[point], choice.fold)
    perm = choice.points[point].perm
    return order if perm is None else order[perm]


def bf16(a: np.ndarray) -> np.ndarray:
    bits = np.asarray(a, np.float32).view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return ((bits >> 16) << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def int_quantize(a: np.ndarray, group: int, top: int, clip: float = 1.0) -> np.ndarray:
    parts = a.reshape(len(a), -1, group)
    scale = bf16(clip * np.abs(parts).max(-1, keepdims=True) / top)
    scale[scale == 0] = 1
    return (np.clip(np.rint(parts / scale), -top, top) * scale).reshape(a.shape)


def hadamard(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(size)


def reference_error(
    x: np.ndarray,
    w: np.ndarray,
    order: np.ndarray,
    rotation: int,
    group: int,
    top: int,
    wo: bool,
    clip: float = 1.0,
) -> float:
    y = x @ w.T
    x, w = x[:, order], w[:, order]
    if rotation:
        h = np.kron(np.eye(x.shape[1] // rotation), hadamard(rotation))
        x, w = x @ h, w @ h
    qx = x if wo else int_quantize(x, group, top, clip)
    return float(((y - qx @ int_quantize(w, group, top).T) ** 2).sum() / (y**2).sum())


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("name", "sort", "rotate", "one_row"),
    [("int4", 1, 0, 0), ("int3", 1, 1, 0), ("int4", 0, 1, 0), ("int4", 1, 1, 1), ("int3", 0, 0, 0)],
)
def test_reported_errors_equal_numpy_in_float64(
    fold: bool, name: str, sort: int, rotate: int, one_row: int
) -> None:
    x, w = planted(1, rows=301)
    region, moments = one_point(fold=fold, one_row=bool(one_row)), moments_of(x)
    fmt = get_format(name, 32)
    choice = choose(
        region, {"w": moments}, {"w": w}, settings(fmt, sort=bool(sort), rotate=bool(rotate))
    )
    held = moments.sample()[1::2].double().numpy()
    own = choice.points["w"]
    for order, rotation, found in (
        (np.arange(K), 0, choice.errors["w"].before),
        (order_of(region, choice, "w"), own.rotation, choice.errors["w"].after),
    ):
        top = {"int4": 7, "int3": 3}[name]
        wide = w.double().numpy()
        wanted = reference_error(held, wide, order, rotation, 32, top, bool(one_row))
        assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", ["int4", "int3", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("fold", [True, False])
def test_sort_wins_on_planted_outliers(name: str, fold: bool) -> None:
    x, w = planted(2)
    region = one_point(fold=fold)
    fmt = get_format(name)
    choice = choose(region, {"w": moments_of(x)}, {"w": w}, settings(fmt, tau=0.02))
    error = choice.errors["w"]
    assert choice.accepted and choice.alpha in (0.25, 0.5, 0.75) and choice.rotation == 0
    # Formats with an own exponent an element (e2m1) lose less to outliers, so gain less.
    assert error.after < (0.6 if name.startswith("int") else 0.95) * error.before
    assert choice.absorb == {"w": "fold" if fold else "norm"}
    assert (choice.fold is None) == (choice.points["w"].perm is not None) == (not fold)
    large = np.flatnonzero(np.isin(order_of(region, choice, "w"), np.arange(0, K, 9)))
    assert large.size == 22 and (large.max() < 32 or large.min() >= K - 32)  # at one end


@pytest.mark.parametrize("name", ["int4", "int3", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("fold", [True, False])
def test_like_channels_are_left_alone(name: str, fold: bool) -> None:
    for seed in range(3):
        g = rng(seed)
        x = g.standard_normal((500, K))
        # Few outputs would let one realization of the weights' rounding win by chance.
        w = torch.from_numpy(g.standard_normal((300, K))).float()
        fmt = get_format(name)
        given = settings(fmt, tau=0.04, rotate=True)
        choice = choose(one_point(fold=fold), {"w": moments_of(x)}, {"w": w}, given)
        assert not choice.accepted
        assert choice.fold is None and choice.points["w"].perm is None and choice.rotation == 0
        assert choice.errors["w"].after == choice.errors["w"].before
        assert choice.alpha is None and choice.absorb == {"w": "none"}


def test_methods() -> None:
    x, w = planted(3)
    moments = {"w": moments_of(x)}
    region = one_point()
    rtn = choose(region, moments, {"w": w}, settings(sort=False))
    assert not rtn.accepted and "no candidate" in rtn.reason
    rotated = choose(region, moments, {"w": w}, settings(sort=False, rotate=True))
    assert rotated.rotation == 64 and rotated.fold is None and rotated.points["w"].perm is None
    both = choose(region, moments, {"w": w}, settings(rotate=True))
    sort = choose(region, moments, {"w": w}, settings())
    assert both.errors["w"].after <= min(rotated.errors["w"].after, sort.errors["w"].after)
    # W4A8 with a scale a row: blocks of the weight's group.
    w4a8 = settings(sort=False, rotate=True, activation=get_format("fp8"))
    assert choose(region, moments, {"w": w}, w4a8).rotation in (0, 64)


@pytest.mark.parametrize("sort", [True, False])
def test_clipping_by_a_constant(sort: bool) -> None:
    # Bell-shaped channels and three bits: finer steps are worth a clipped tail.
    g, fmt = rng(12), get_format("int3", 64)
    x = g.standard_normal((500, K))
    w = torch.from_numpy(g.standard_normal((200, K))).float()
    moments, clips = {"w": moments_of(x)}, (0.9, 0.8, 0.7, 0.05)
    given = settings(fmt, sort=sort, rotate=sort, clips=clips)
    choice = choose(one_point(), moments, {"w": w}, given)
    own = choice.points["w"]
    assert choice.accepted and own.clip in (0.9, 0.8, 0.7)
    assert choice.errors["w"].after < 0.95 * choice.errors["w"].before
    order = order_of(one_point(), choice, "w")
    held = moments["w"].sample()[1::2].double().numpy()
    wide = w.double().numpy()
    wanted = reference_error(held, wide, order, own.rotation, 64, 3, False, own.clip)
    assert choice.errors["w"].after == pytest.approx(wanted, rel=0.01)
    only = choose(one_point(one_row=True), moments, {"w": w}, settings(fmt, clips=clips))
    assert only.points["w"].clip == 1.0  # nothing is quantized there


def test_searched_weight_scales_are_measured() -> None:
    fmt, (x, w) = get_format("int3", 64), planted(13)
    plain, searched = (
        choose(one_point(), {"w": moments_of(x)}, {"w": w}, settings(fmt, weight_search=ratios))
        for ratios in ((), (1.0, 0.9, 0.8, 0.7))
    )
    assert searched.errors["w"].before < plain.errors["w"].before
    assert searched.errors["w"].after < plain.errors["w"].after


def test_the_halves_are_disjoint() -> None:
    # An outlier channel that only rows for fitting show: fitted on, but refused by the others.
    g = rng(4)
    x = g.standard_normal((200, K))
    w = torch.from_numpy(g.standard_normal((45, K))).float()
    moments = moments_of(x)
    order = moments.keys.argsort()
    moments.rows[order[0:200:2], ::9] *= 20
    choice = choose(one_point(), {"w": moments}, {"w": w}, settings(tau=0.05))
    assert not choice.accepted and "held-out" in choice.reason
    clean = moments_of(x)
    assert choice.errors["w"].before == pytest.approx(
        choose(one_point(), {"w": clean}, {"w": w}, settings(tau=0.9)).errors["w"].before
    )


def test_two_points_share_one_fold_inside_its_blocks() -> None:
    """Joint attention: 3 heads of 64, both streams in one region, another column order in one."""
    g = rng(5)
    columns = {"a": np.arange(K), "b": np.r_[np.arange(64, K), np.arange(64)]}
    blocks = np.repeat(np.arange(3), 64)
    points = tuple(Point(n, (n,), K, "quantize", False) for n in "ab")
    axes = (FoldAxis("v", 0, np.arange(K)), FoldAxis("a", 1, columns["a"]))
    region = Region("a", points, blocks, columns, axes)
    size = np.exp(1.5 * g.standard_normal(K))
    x = {n: g.standard_normal((400, K)) * size[columns[n]] for n in "ab"}
    w = {n: g.standard_normal((30, K)) / size[columns[n]] ** 0.8 for n in "ab"}
    w = {n: torch.from_numpy(v).float() for n, v in w.items()}
    moments = {n: moments_of(x[n]) for n in "ab"}
    fmt = get_format("int4", 16)
    given = settings(fmt, alphas=(1.0,), gather_margin=0.99)
    choice = choose(region, moments, w, given)
    assert choice.accepted and choice.absorb == {"a": "fold", "b": "fold"}
    assert choice.fold is not None and (blocks[choice.fold] == blocks).all()
    fold_tensors(region, choice.fold, {"v": torch.zeros(K, 3), "a": w["a"]})
    for c in range(3):  # sorted inside each head
        values = size[choice.fold[blocks == c]]
        assert np.corrcoef(np.arange(64), np.argsort(values))[0, 1] > 0.99
    # With groups as large as a head nothing inside a head changes who shares a scale.
    same = choose(region, moments, w, settings(get_format("int4", 64), gather_margin=0.99))
    assert same.fold is None and same.alpha is None and not same.accepted
    # A gather on top of the fold may cross heads; its order is relative to the folded columns.
    free = choose(region, moments, w, settings(get_format("int4", 64), gather_margin=0.0))
    assert free.absorb == {"a": "quantize", "b": "quantize"} and free.accepted
    assert free.errors["a"].after < 0.9 * free.errors["a"].before


def test_gather_behind_a_fold_is_relative_to_the_folded_columns() -> None:
    # Point a: blocks of 32 suffice. Point b holds the same channels twice, far apart (GQA).
    g = rng(6)
    blocks = np.repeat(np.arange(6), 32)
    columns = {"a": np.arange(K), "b": np.r_[np.arange(K), np.arange(K)]}
    points = (
        Point("a", ("a",), K, "quantize", False),
        Point("b", ("b",), 2 * K, "quantize", False),
    )
    region = Region("a", points, blocks, columns)
    size = np.tile(np.r_[np.ones(28), 15 * np.ones(4)], 6)
    tail = np.r_[np.ones(K), np.exp(1.5 * g.standard_normal(K))]
    x = {
        "a": g.standard_normal((400, K)) * size,
        "b": g.standard_normal((400, 2 * K)) * size[columns["b"]] * tail,
    }
    w = {n: torch.from_numpy(g.standard_normal((30, v.shape[1]))).float() for n, v in x.items()}
    moments = {n: moments_of(v) for n, v in x.items()}
    given = settings(get_format("int4", 16), alphas=(1.0,), gather_margin=0.05)
    choice = choose(region, moments, w, given)
    assert choice.accepted
    for name in "ab":
        order = order_of(region, choice, name)
        assert sorted(order) == list(range(len(order)))
        held = moments[name].sample()[1::2][: given.held_rows].double().numpy()
        wanted = reference_error(held, w[name].double().numpy(), order, 0, 16, 7, False)
        assert choice.errors[name].after == pytest.approx(wanted, rel=0.01)


def test_repeated_channels_move_together() -> None:
    g = rng(7)
    columns = np.r_[np.arange(64), np.arange(64), np.arange(64)]
    region = Region(
        "w", (Point("w", ("w",), K, "quantize", False),), np.zeros(64, np.int64), {"w": columns}
    )
    size = np.where(np.arange(64) % 8 == 0, 20.0, 1.0)[columns]
    x = g.standard_normal((300, K)) * size
    w = torch.from_numpy(g.standard_normal((20, K))).float()
    choice = choose(region, {"w": moments_of(x)}, {"w": w}, settings(get_format("int4", 16)))
    assert choice.absorb == {"w": "fold"} and choice.errors["w"].after < choice.errors["w"].before
    order = order_of(region, choice, "w")
    assert (columns[order].reshape(3, 64) == columns[order][:64]).all()


def test_weights_only_points_are_folded_or_nothing() -> None:
    g = rng(8)
    x = g.standard_normal((7, K))
    w = torch.from_numpy(g.standard_normal((40, K))).float()
    w[:, ::9] *= 20
    given = settings(rotate=True)
    folded = choose(one_point(one_row=True), {"w": moments_of(x)}, {"w": w}, given)
    assert folded.absorb == {"w": "fold"} and folded.rotation == 0
    fixed = choose(one_point(fold=False, one_row=True), {"w": moments_of(x)}, {"w": w}, given)
    assert not fixed.accepted and fixed.absorb == {"w": "none"}
    none = settings(rotate=True, activation=None)
    wide = choose(one_point(fold=False), {"w": moments_of(x)}, {"w": w}, none)
    assert not wide.accepted and wide.points["w"].perm is None
    # Q(X) = X: the error is the weights' alone.
    held = moments_of(x).sample()[1::2].double().numpy()
    wanted = reference_error(held, w.double().numpy(), np.arange(K), 0, 64, 7, True)
    assert fixed.errors["w"].before == wide.errors["w"].before == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4"])
def test_zeros_and_tiny_samples(name: str) -> None:
    fmt = get_format(name)
    for rows in (1, 2, 3):
        x, w = planted(9, rows=rows)
        choice = choose(one_point(), {"w": moments_of(x)}, {"w": w}, settings(fmt, rotate=True))
        assert np.isfinite(choice.errors["w"].after)
        assert rows > 1 or (not choice.accepted and "too few rows" in choice.reason)
    x, w = planted(9)
    x[:, 5:90], w[:, 30:140] = 0, 0
    choice = choose(one_point(), {"w": moments_of(x)}, {"w": w}, settings(fmt, rotate=True))
    assert choice.errors["w"].after <= choice.errors["w"].before < 1
    for zero in (np.zeros_like(x), x):
        weight = torch.zeros_like(w) if zero is x else w
        choice = choose(one_point(), {"w": moments_of(zero)}, {"w": weight}, settings(fmt))
        assert not choice.accepted and choice.errors["w"].after == 0


def test_several_linears_and_determinism() -> None:
    x, w = planted(10)
    weights = {"w": w, "v": w[:7] * 100}
    region = one_point(linears=("w", "v"))
    moments = {"w": moments_of(x)}
    a, b = (choose(region, moments, weights, settings(rotate=True)) for _ in range(2))
    assert set(a.errors) == {"w", "v"} and a.errors == b.errors
    assert a.fold is not None and b.fold is not None and (a.fold == b.fold).all()
    # Relative errors: a linear's size does not count. bf16 gives about the same.
    half = {n: v.bfloat16() for n, v in weights.items()}
    low = choose(region, moments, half, settings(rotate=True))
    assert low.errors["w"].after == pytest.approx(a.errors["w"].after, rel=0.15)


def test_errors() -> None:
    x, w = planted(11)
    region, given = one_point(), settings()
    with pytest.raises(CalibrationError, match="w: no statistics"):
        choose(region, {}, {"w": w}, given)
    with pytest.raises(CalibrationError, match="w: no activation"):
        choose(region, {"w": Moments.create(K)}, {"w": w}, given)
    x[3, 7] = np.nan
    with pytest.raises(CalibrationError, match="w: 1 of 192 channels"):
        choose(region, {"w": moments_of(x)}, {"w": w}, given)
    w[2, 3] = torch.inf
    with pytest.raises(CalibrationError, match="weight holds NaN"):
        choose(region, {"w": moments_of(planted(11)[0])}, {"w": w}, given)
    with pytest.raises(GraphError, match="out of its block"):
        fold_tensors(one_point(fold=False), np.arange(K)[::-1].copy(), {})


def test_regroups() -> None:
    assert not regroups(None, 4) and not regroups(np.arange(8)[::-1], 4)
    assert not regroups(np.r_[4:8, 0:4], 4) and not regroups(np.arange(8), 0)
    assert regroups(np.array([0, 1, 2, 4, 3, 5, 6, 7]), 4)
    assert [rotation_size(192, g) for g in ((64, 16), (0, 64), (0, 0), (48, 0))] == [64, 64, 64, 16]


def test_linears_of_one_region_are_measured_in_their_own_formats() -> None:
    """Rules, a budget or odd channel counts give linears of one point other weight formats."""
    x, w = planted(31, rows=301)
    other = torch.from_numpy(rng(32).standard_normal((17, K))).float()
    region, moments = one_point(linears=("w", "v")), moments_of(x)
    weights = {"w": w, "v": other}
    fine = get_format("int4", 16)
    own = {"w": settings(), "v": Settings(weight=fine, activation=INT4, rotate=False)}
    choice = choose(region, {"w": moments}, weights, own)
    order = order_of(region, choice, "w")
    held = moments.sample().double().numpy()[1::2][:256]
    qx = int_quantize(held[:, order], 64, 7)
    for name, group in (("w", 64), ("v", 16)):
        weight = weights[name].double().numpy()
        y = held @ weight.T
        lost = y - qx @ int_quantize(weight[:, order], group, 7).T
        wanted = (lost**2).sum() / (y**2).sum()
        assert choice.errors[name].after == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("rotation", [16, 32, 64])
def test_a_rotation_as_one_product_is_the_rotation(rotation: int) -> None:
    """What conversion computes on a GPU; rows of a strided view too."""
    torch.manual_seed(rotation)
    wide = torch.randn(7, 2, 3 * rotation)
    for x in (wide[:, 0], wide.transpose(0, 1)):
        got = rotate_by_product(x, rotation)
        torch.testing.assert_close(got, rotate(x, rotation), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, rotate(x.flip(-1), rotation), atol=1e-2)


def test_clip_ratios_share_one_quantization_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    g = rng(31)
    x, w = planted(32, rows=60, channels=128)
    rows, weight = torch.from_numpy(x).float(), {"w": w, "v": w[:20] * 3}
    given = settings(get_format("int4", 32), fit_rows=40)
    order = g.permutation(128)
    ratios = (1.0, 0.9, 0.8, 1.25)

    def fresh() -> PointErrors:
        return PointErrors(lambda: Measured(rows, 40), ["w", "v"], weight, given)

    alone = {c: fresh()(order, 32, c) for c in ratios}
    shared, asked = fresh(), []
    known = shared(order, 32, 0.9).fit
    monkeypatch.setattr(shared, "_lost", lambda name, *a: asked.append(name) or _lost(name, *a))
    _lost = partial(PointErrors._lost, shared)
    shared.with_clips(order, 32, ratios)
    assert asked == ["w", "v"] and shared(order, 32, 0.9).fit is known
    for ratio, errors in alone.items():
        assert shared(order, 32, ratio).fit == errors.fit
        assert shared(order, 32, ratio).held == errors.held
    assert asked == ["w", "v"] * 5  # once for all four, and the other rows one by one
    with monkeypatch.context() as few:
        few.setattr(turned, "_CPU_ELEMENTS", 80 * 128)  # two ratios at a time
        pieces = fresh()
        pieces.with_clips(order, 32, ratios)
        for ratio, errors in alone.items():
            assert pieces(order, 32, ratio).fit == pytest.approx(errors.fit, rel=1e-5)


def test_measured_points_are_freed_without_the_garbage_collector() -> None:
    """A region has hundreds of points, whose rows and outputs a device cannot hold."""
    x, w = planted(41, rows=60, channels=128)
    gc.disable()
    try:
        measure = PointErrors(
            lambda: Measured(torch.from_numpy(x).float(), 40), ["w"], {"w": w}, settings()
        )
        alive = weakref.ref(measure)
        assert measure.original().held["w"] > 0 and measure(None, 64).fit["w"] > 0
        del measure
        assert alive() is None
    finally:
        gc.enable()
