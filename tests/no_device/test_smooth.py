"""Smoothing and the low-rank branch: against numpy, folded and unfolded, saved and compiled."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pq_fx
from pq_fx.dequantize import dequantize
from pq_fx.modules import quantized_linears

K, GROUP = 64, 16
CONFIG = {"group_size": GROUP, "weight_only_format": "int4:16:bf16", "calibration_rows": 256}


class Block(nn.Module):
    """RMSNorm with a weight -> gated MLP, and a layer norm without one -> a linear: every way to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(K, K)
        self.norm = nn.RMSNorm(K)
        self.gate, self.up = nn.Linear(K, 2 * K, bias=False), nn.Linear(K, 2 * K)
        self.down = nn.Linear(2 * K, K)
        self.plain = nn.LayerNorm(K, elementwise_affine=False)
        self.last = nn.Linear(K, K)
        self.head = nn.Linear(K, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        x = x + self.last(self.plain(x))
        return self.head(self.plain(x))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    model = Block().eval()
    with torch.no_grad():  # outlier channels, for which smoothing is made
        model.norm.weight[::7] = 25.0
        model.up.weight[::9] *= 25.0
        model.inp.weight[::11] *= 30.0
    return model


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randn(4, 40, K, generator=g) for _ in range(3)]


def converted(
    method: str, format: str = "int4", **parts: object
) -> tuple[nn.Module, pq_fx.Report, Block]:
    model = block()
    was = copy.deepcopy(model)
    config = pq_fx.QuantConfig(format, method=method, parts=parts or None, **CONFIG)
    quantizer = pq_fx.prepare(model, config)
    with torch.no_grad(), quantizer.calibrate():
        for x in batches():
            model(x)
    return model, quantizer.convert(), was


def test_scales_go_where_they_commute() -> None:
    model, report, was = converted("smoothquant")
    how = {row.fqn: row.smooth for row in report.layers if row.quantized}
    assert how["gate"] == how["up"] == "folded"  # into the norm's weight
    assert how["down"] == "folded"  # into the rows of `up`, the linear half; not of `gate`
    assert how["last"] == "multiply"  # a norm without a weight has nowhere to put it
    assert not torch.equal(model.norm.weight, was.norm.weight)
    linears = quantized_linears(model)
    assert linears["down"].input_quantizer.smooth is None
    assert linears["last"].input_quantizer.smooth is not None
    for row in report.layers:
        if row.smooth:
            assert row.error_after < row.error_before
    with torch.no_grad():
        wanted = [was(x) for x in batches()]
        rtn, _, _ = converted("rtn")
        error, plain = (
            sum(float((m(x) - y).square().sum()) for x, y in zip(batches(), wanted, strict=True))
            for m in (model, rtn)
        )
    assert error < 0.8 * plain


def test_folded_scales_meet_their_inverses() -> None:
    """With 8 bits little but the folds could change the outputs; one undone, they are far off."""
    model, report, was = converted("smoothquant", format="int8")
    assert {row.smooth for row in report.layers} >= {"folded", "multiply"}
    x = batches()[0]
    with torch.no_grad():
        wanted, got = was(x), model(x)
        assert float((got - wanted).norm() / wanted.norm()) < 0.02
        model.norm.weight.copy_(was.norm.weight)
        assert float((model(x) - wanted).norm() / wanted.norm()) > 0.2


@pytest.mark.parametrize("method", ["smoothquant", "svdquant"])
def test_saved_loaded_and_compiled(method: str, tmp_path: Path) -> None:
    model, report, was = converted(method)
    pq_fx.save(model, tmp_path / "q")
    loaded = copy.deepcopy(was)
    pq_fx.load(tmp_path / "q", loaded)
    x = batches()[0]
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
        compiled = torch.compile(model, backend="permuquant", fullgraph=True)(x)
    assert float((compiled - model(x)).detach().norm() / model(x).norm()) < 1e-3
    if method == "svdquant":
        with torch.no_grad():
            exact = was(x)
            assert float((dequantize(model)(x) - exact).norm() / exact.norm()) < 0.2
        assert {row.low_rank for row in report.layers if row.quantized} == {32}


def test_the_branch_is_the_best_approximation_of_its_rank() -> None:
    model, _, was = converted("svdquant", smooth=False, low_rank=5)
    up, down = (getattr(quantized_linears(model)["last"], f"low_rank_{p}") for p in ("up", "down"))
    weight = was.last.weight.detach().double()
    assert up.shape == (K, 5) and down.shape == (5, K)
    values = torch.linalg.svdvals(weight)
    left = float((weight - up.double() @ down.double()).square().sum())
    assert left == pytest.approx(float(values[5:].square().sum()), rel=1e-4)
    # The packed residual: together they are closer to the weight than the branch alone.
    x = batches()[0]
    h = was.plain(was.inp(x))
    with torch.no_grad():
        exact, got = was.last(h), quantized_linears(model)["last"](h)
    assert float((got - exact).norm() / exact.norm()) < 0.2
