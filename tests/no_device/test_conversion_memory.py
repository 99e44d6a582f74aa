"""Conversion works on parts of weights and holds one point at a time: same numbers, and nothing kept alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import pq_fx
from pq_fx import edits, rounded
from pq_fx.edits import Edits, Scaled
from pq_fx.kernels.formats import get_format
from pq_fx.passes import rounding
from pq_fx.passes.choose import Settings, choose
from pq_fx.passes.moments import Moments
from pq_fx.passes.observe import observe
from pq_fx.passes.regions import Point, Region
from tests.toy import calibrated, toy

N, K = 37, 48


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(seed: int) -> Edits:
    """Both axes scaled and reordered, a bias shifted and reordered."""
    found = Edits({"w": random(seed, N, K).bfloat16(), "b": random(seed + 1, N)})
    g = torch.Generator().manual_seed(seed)
    for axis, size in ((0, N), (1, K)):
        found.scale("w", axis, random(seed + 2 + axis, size).exp())
        found.reorder("w", axis, torch.randperm(size, generator=g))
    found.center("w", "b", random(seed + 4, K))
    found.reorder("b", 0, torch.randperm(N, generator=g))
    return found


def test_edits_by_rows_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(1)
    monkeypatch.setattr(edits, "_ELEMENTS", 5 * K + 3)
    parts = made(1)
    assert torch.equal(parts.scaled("w"), whole.scaled("w"))
    assert torch.equal(parts.edited("w"), whole.edited("w"))
    some, index = slice(3, 20), torch.tensor([7, 0, 40, 13])
    assert torch.equal(parts.rows("w").columns(some, index), whole.edited("w")[some][:, index])
    scaled = parts.rows("w", ordered=False)
    assert torch.equal(scaled.columns(some, index), whole.scaled("w")[some][:, index])
    # What the bias takes over is a product, whose sums depend on its shape.
    torch.testing.assert_close(parts.edited("b"), whole.edited("b"), rtol=1e-5, atol=1e-5)
    # Against the definition: scaled in the weight's own dtype axis by axis, then reordered.
    w = whole.tensors["w"]
    for axis in (0, 1):
        shape = [-1, 1] if axis == 0 else [1, -1]
        w = (w.float() * whole._factors["w", axis].view(shape)).bfloat16()
    assert torch.equal(whole.scaled("w"), w)
    order = whole._orders["w", 0], whole._orders["w", 1]
    assert torch.equal(whole.edited("w"), w[order[0]][:, order[1]])


def test_scaled_weights_are_made_when_asked_for() -> None:
    found = Scaled(made(2), ["w"])
    assert list(found) == ["w"] and len(found) == 1
    alive = weakref.ref(found["w"])
    assert alive() is None
    with pytest.raises(KeyError):
        found["b"]


class Fresh(Mapping[str, Tensor]):
    """Gives a new copy of a weight each time and counts how many of them are alive."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights, self.given, self.most = weights, list[weakref.ref[Tensor]](), 0

    def __getitem__(self, name: str) -> Tensor:
        self.given = [ref for ref in self.given if ref() is not None]
        copy = self.weights[name].clone()
        self.given.append(weakref.ref(copy))
        self.most = max(self.most, len(self.given))
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_choosing_holds_the_weights_of_one_point() -> None:
    names = [f"w{i}" for i in range(6)]
    points = tuple(Point(n, (n,), K, "norm", False) for n in names)
    region = Region("w0", points, np.zeros(K, np.int64), {n: np.arange(K) for n in names})
    moments = {}
    for i, name in enumerate(names):
        moments[name] = Moments.create(K, 64)
        observe(random(i, 100, K) * random(99, K).exp(), *moments[name].tensors(), i)
    fmt = get_format("int4", 16)
    weights = {n: random(10 + i, N, K) for i, n in enumerate(names)}
    fresh = Fresh(weights)
    own = Settings(weight=fmt, activation=fmt, clips=(0.9,), half_rotate=True, refine=3)
    choice = choose(region, moments, fresh, own)
    assert fresh.most <= 2  # one is replaced by the next
    plain = choose(region, moments, weights, own)
    assert choice.reason == plain.reason and choice.errors == plain.errors


@pytest.mark.parametrize("method", ["permuquant-h", "best", "svdquant"])
@pytest.mark.parametrize("format", ["int4", "nvfp4", "fp8"])
def test_rounding_parts_gives_the_same_model(
    monkeypatch: pytest.MonkeyPatch, method: str, format: str
) -> None:
    config = pq_fx.QuantConfig(format, method=method)
    model = toy(3)
    statistics = calibrated(model, config).statistics()
    whole = toy(3)
    pq_fx.prepare(whole, config, statistics=statistics).convert()
    monkeypatch.setattr(rounded, "_ROUNDED", {"cpu": 1 << 15})
    monkeypatch.setattr(rounded, "_TURNED", {"cpu": 1 << 10})
    monkeypatch.setattr(rounding, "_SEARCHED", 1 << 12)
    parts = toy(3)
    pq_fx.prepare(parts, config, statistics=statistics).convert()
    left, right = whole.state_dict(), parts.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        if value.is_floating_point() and value.element_size() > 1:
            torch.testing.assert_close(right[name], value, rtol=1e-5, atol=1e-6)
        else:
            # Products of other shapes may round a tie the other way, which then spreads.
            assert (right[name].view(torch.uint8) == value.view(torch.uint8)).float().mean() > 0.99
