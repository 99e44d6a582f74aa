"""Mixed formats: the greedy spread against brute force, and the sizes that a model really gets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import pq_fx
from pq_fx.budget import ladder, spread
from pq_fx.errors import ConfigError
from pq_fx.kernels.formats import Format
from pq_fx.scope import Layer

BITS = (3.25, 4.25, 8.5)


class Chain(nn.Module):
    """Linears one after the other."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.parts = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x


def brute_force(sizes: dict, errors: dict, budget: float) -> float:
    names, total = list(sizes), sum(sizes.values())
    best = np.inf
    for rungs in itertools.product(range(3), repeat=len(names)):
        used = sum(BITS[r] * sizes[n] for n, r in zip(names, rungs, strict=True))
        if used <= budget * total + 1e-9:
            best = min(best, sum(errors[n][r] for n, r in zip(names, rungs, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [3.3, 4.25, 5.0, 9.0])
def test_close_to_the_best_spread(seed: int, budget: float) -> None:
    g = np.random.default_rng(seed)
    sizes = {f"w{i}": int(g.integers(1, 5)) * 1000 for i in range(7)}
    scale = np.exp(g.standard_normal(7))
    errors = {n: [s * 0.2, s * 0.04, s * 0.0004] for n, s in zip(sizes, scale, strict=True)}
    rungs = spread(sizes, errors, dict.fromkeys(sizes, BITS), budget)
    used = sum(BITS[rungs[n]] * sizes[n] for n in sizes)
    assert used <= budget * sum(sizes.values()) + 1e-6
    found = sum(errors[n][rungs[n]] for n in sizes)
    wanted = brute_force(sizes, errors, budget)
    # Greedy may leave the last step's bytes unused: at most one weight's step away.
    assert wanted <= found <= wanted + max(e[0] - e[1] for e in errors.values())
    if budget >= 8.5:
        assert set(rungs.values()) == {2}


def test_sensitive_weights_get_the_bits() -> None:
    sizes = dict.fromkeys("abc", 100)
    errors = {"a": [1.0, 0.1, 0.0], "b": [0.1, 0.01, 0.0], "c": [0.01, 0.001, 0.0]}
    assert spread(sizes, errors, dict.fromkeys(sizes, BITS), 3.6) == {"a": 1, "b": 0, "c": 0}
    with pytest.raises(ConfigError, match=r"3\.25 bits"):
        spread(sizes, errors, dict.fromkeys(sizes, BITS), 3.0)


def test_a_models_weights_stay_inside_the_budget() -> None:
    torch.manual_seed(0)
    widths = (64, 128, 64, 128, 64)
    model = Chain(widths)
    with torch.no_grad():
        model.parts[1].weight[:, ::16] *= 20  # outliers, so that 3 bits hurt here most
    config = pq_fx.QuantConfig(
        "int4", group_size=32, budget_bits=6.0, calibration_rows=64, rules={"_default": {}}
    )
    quantizer = pq_fx.prepare(model, config)
    x = torch.randn(100, 64)
    with torch.no_grad(), quantizer.calibrate():
        model(x)
    report = quantizer.convert()
    bits = {r.fqn: Format.parse(r.format).bits_per_weight for r in report.quantized}
    sizes = {r.fqn: r.in_features * r.out_features for r in report.quantized}
    assert len(bits) == 4 and len(set(bits.values())) > 1
    assert sum(bits[n] * sizes[n] for n in bits) <= 6.0 * sum(sizes.values())
    assert bits["parts.1"] == max(bits.values())
    assert {r.activation_format for r in report.quantized} == {"int4:32:bf16"}
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "best"}, ["int3f", "int4f", "int8"]),
        ({"method": "best", "format": "nvfp4"}, ["int3f", "int4f", "int8"]),
        ({"method": "best", "parts": {"full_range": False}}, ["int3", "int4", "int8"]),
        ({"method": "permuquant-h", "format": "int3f"}, ["int3f", "int4f", "int8"]),
    ],
)
def test_the_ladder_has_the_layers_range(settings: dict, names: list[str]) -> None:
    config = pq_fx.QuantConfig(**settings)
    layer = Layer(None, config, None, False, config.weight, config.activation)
    assert [fmt.name for fmt in ladder(layer)] == names
    layer.one_row = True
    assert [fmt.name for fmt in ladder(layer)] == names[1:]
