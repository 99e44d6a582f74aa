"""Centers and balanced channels: against numpy, folded exactly, and not where another reader would see them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pq_fx
from pq_fx import applied
from pq_fx.kernels.formats import get_format
from pq_fx.passes.balance import balance
from pq_fx.passes.choice import Settings
from pq_fx.passes.moments import Moments
from pq_fx.passes.observe import observe
from pq_fx.passes.regions import Point

K, GROUP, ROWS = 64, 16, 512
PARTS = {"compensate": False, "clip": False, "search": False, "correct_bias": False}


class Modulated(nn.Module):
    """norm(x) * (1 + scale) + shift -> two linears; scale and shift are rows of one linear, as in FLUX."""

    def __init__(self, *, bias: bool = True, leak: bool = False) -> None:
        super().__init__()
        self.inp, self.time = nn.Linear(K, K), nn.Linear(K, K)
        self.norm = nn.LayerNorm(K, elementwise_affine=False)
        self.mod = nn.Linear(K, 3 * K)
        self.one, self.two = nn.Linear(K, K, bias=bias), nn.Linear(K, K)
        self.head = nn.Linear(K, 8)
        self.leak = leak

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.inp(x)
        shift, scale, gate = self.mod(torch.sigmoid(self.time(t))).chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        y = x + gate[:, None] * torch.tanh(self.one(h) * self.two(h))
        return self.head(self.norm(y + scale[:, None]) if self.leak else self.norm(y))


def model(**kinds: bool) -> Modulated:
    torch.manual_seed(3)
    made = Modulated(**kinds).eval()
    with torch.no_grad():  # channels of unlike size and with means: what balancing is made for
        made.mod.bias[:K] = torch.randn(K).mul(1.5)
        made.mod.bias[K : 2 * K] = torch.randn(K).exp() - 1.0
    return made


def inputs() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 40, K, generator=g), torch.randn(4, K, generator=g)) for _ in range(4)]


def converted(
    made: nn.Module, format: str = "int8", **parts: bool
) -> tuple[nn.Module, pq_fx.Report]:
    config = pq_fx.QuantConfig(
        format,
        group_size=GROUP,
        method="best",
        parts=PARTS | parts,
        calibration_rows=256,
        weight_only_format="int8",
        modules_to_not_convert=("mod",),
    )
    quantizer = pq_fx.prepare(made, config)
    with torch.no_grad(), quantizer.calibrate():
        for x, t in inputs():
            made(x, t)
    return made, quantizer.convert()


def test_folds_are_exact() -> None:
    """With 8 bits little but the folds could change the outputs; one undone, they are far off."""
    made = model()
    was = copy.deepcopy(made)
    made, report = converted(made)
    rows = {row.fqn: row for row in report.layers if row.quantized}
    assert rows["one"].smooth == rows["two"].smooth == "folded"
    assert applied.of_model(made)["one.weight", 1].center is not None
    assert torch.equal(made.mod.weight[2 * K :], was.mod.weight[2 * K :])  # the gate stays
    assert not torch.equal(made.mod.bias[:K], was.mod.bias[:K])
    x, t = inputs()[0]
    with torch.no_grad():
        want, got = was(x, t), made(x, t)
        assert float((got - want).norm() / want.norm()) < 0.03
        made.mod.bias.copy_(was.mod.bias)
        assert float((made(x, t) - want).norm() / want.norm()) > 0.15


def test_folds_where_shapes_are_dynamic() -> None:
    """Other numbers of rows and of tokens make Dynamo's sizes symbols, which the graph reads off tensors."""
    made = model()
    config = pq_fx.QuantConfig(
        "int8", group_size=GROUP, method="best", parts=PARTS, weight_only_format="int8"
    )
    quantizer = pq_fx.prepare(made, config)
    with torch.no_grad(), quantizer.calibrate():
        for x, t in inputs():
            for rows, tokens in ((4, 40), (3, 30), (2, 17)):
                made(x[:rows, :tokens], t[:rows])
    report = quantizer.convert()
    assert {row.smooth for row in report.layers if row.fqn in ("one", "two")} == {"folded"}


def test_less_error_at_four_bits() -> None:
    """Each part by itself, and both together, lower the error on rows that nothing was fitted on."""
    errors = {}
    for center in (False, True):
        for scale in (False, True):
            _, report = converted(model(), "int4", center=center, balance=scale)
            errors[center, scale] = sum(
                row.error_after or 0.0 for row in report.layers if row.fqn in ("one", "two")
            )
    assert errors[True, False] < 0.95 * errors[False, False]
    assert errors[False, True] < 0.95 * errors[False, False]
    assert errors[True, True] < min(errors[True, False], errors[False, True])


@pytest.mark.parametrize(
    ("kinds", "smooth", "centered"),
    [({"leak": True}, None, False), ({"bias": False}, "folded", False)],
)
def test_no_fold_where_it_would_be_seen(
    kinds: dict[str, bool], smooth: str | None, centered: bool
) -> None:
    """Another reader of the scale: nothing folds. A linear without a bias cannot give back a mean."""
    made, report = converted(model(**kinds))
    assert {row.smooth for row in report.layers if row.fqn in ("one", "two")} == {smooth}
    edit = applied.of_model(made).get(("one.weight", 1))
    assert (edit is not None and edit.center is not None) == centered


def test_scale_and_center_against_numpy() -> None:
    g = torch.Generator().manual_seed(1)
    sizes = torch.randn(K, generator=g).exp()
    x = torch.randn(ROWS, K, generator=g) * sizes + 2.0 * sizes
    w = torch.randn(24, K, generator=g)
    moments = Moments.create(K, rows=ROWS)
    observe(x, *moments.tensors(), 0)
    fmt = get_format("int4", GROUP, None)
    point = Point("w", ("w",), K, "norm", False)
    found = balance(point, {"w": moments}, {"w": w}, Settings(fmt, fmt), scale=True, center=True)
    assert found is not None
    fit = moments.sample()[0::2].double().numpy()
    center = fit.mean(axis=0)
    np.testing.assert_allclose(found.center.numpy(), center, rtol=1e-4, atol=1e-5)
    ratio = np.sqrt(((fit - center) ** 2).mean(axis=0) / (w.double().numpy() ** 2).mean(axis=0))
    allowed = [ratio**a / (ratio**a).max() for a in (0.0, 0.25, 0.5)]
    assert any(np.allclose(found.scale.numpy(), s, rtol=1e-3) for s in allowed)
    assert float(found.scale.max()) == pytest.approx(1.0)
    one_row = Point("w", ("w",), K, "norm", True)
    assert (
        balance(one_row, {"w": moments}, {"w": w}, Settings(fmt, fmt), scale=True, center=True)
        is None
    )
