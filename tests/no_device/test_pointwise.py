"""Convolutions with a kernel of 1 are quantized as linears; what stays float is a convolution again."""

from __future__ import annotations

import copy

import pytest
import torch
from models import MODELS
from torch import nn

import pq_fx
from pq_fx.errors import CalibrationError
from pq_fx.modules import QuantLinear
from pq_fx.pointwise import PointwiseConv, is_pointwise, linearized

CONFIG = pq_fx.QuantConfig("int4", group_size=16, weight_only_format="int4:16:bf16")
BLOCKS = [f"transformer_blocks.{i}.ff" for i in range(2)]


class Net(nn.Module):
    """Norm, pointwise, depthwise and pointwise convolution, odd picture sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 1)
        self.norm = nn.LayerNorm(32)
        self.widen = nn.Conv2d(32, 96, 1, bias=False)
        self.depth = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.narrow = nn.Conv2d(96, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 1, groups=2)
        self.out = nn.Conv2d(32, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        h = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        h = self.narrow(torch.nn.functional.silu(self.depth(self.widen(h))))
        return self.out(x + self.grouped(h))


def calibrated(model: nn.Module, *args: torch.Tensor, **kwargs: object) -> pq_fx.Quantizer:
    quantizer = pq_fx.prepare(model, CONFIG)
    with quantizer.calibrate(), torch.no_grad():
        model(*args, **kwargs)
    return quantizer


def sana(seed: int) -> tuple[nn.Module, dict]:
    """The tiny SANA with channels that groups of 16 divide."""
    torch.manual_seed(seed)
    config = MODELS["sana"].tiny_config | {"mlp_ratio": 2.0}
    return MODELS["sana"].build(config), MODELS["sana"].tiny_inputs()


def test_what_is_pointwise_and_what_is_not() -> None:
    assert is_pointwise(nn.Conv2d(4, 6, 1)) and is_pointwise(nn.Conv1d(4, 6, 1, padding="same"))
    for other in (
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 6, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Linear(4, 6),
    ):
        assert not is_pointwise(other)


def test_inside_they_are_linears_and_afterwards_themselves() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 5, 7)
    before, want, names = dict(model.named_modules()), model(x), list(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), linearized(model):
        assert isinstance(model.widen, PointwiseConv) and isinstance(model.grouped, nn.Conv2d)
        assert model.widen.linear.weight.data_ptr() == before["widen"].weight.data_ptr()
        assert torch.allclose(model(x), want, atol=1e-5)
        raise RuntimeError("on purpose")
    assert dict(model.named_modules()) == before and list(model.state_dict()) == names
    assert torch.equal(model(x), want)


def test_convert_quantizes_them_and_folds_through_the_depthwise_one() -> None:
    torch.manual_seed(1)
    model, x = Net().eval(), torch.randn(2, 3, 5, 7)
    want = model(x)
    quantizer = calibrated(model, x)
    assert isinstance(model.widen, nn.Conv2d)  # calibration leaves the model as it was
    report = quantizer.convert()
    assert isinstance(model.widen.linear, QuantLinear) and isinstance(
        model.narrow.linear, QuantLinear
    )
    assert type(model.embed) is nn.Conv2d and type(model.out) is nn.Conv2d
    rows = {row.fqn: row for row in report.layers}
    assert rows["embed.linear"].skip_reason.startswith("embedder")
    with torch.no_grad():
        error = ((model(x) - want).norm() / want.norm()).item()
        compiled = torch.compile(model, backend="permuquant")(x)
    assert 0 < error < 0.2
    assert torch.allclose(compiled, model(x), atol=1e-4)
    back = pq_fx.dequantize(copy.deepcopy(model))
    assert type(back.widen) is nn.Conv2d and list(back.state_dict()) == list(Net().state_dict())


def test_sana_is_saved_and_loaded_with_its_convolutions(tmp_path) -> None:
    model, inputs = sana(0)
    wanted = copy.deepcopy(model)
    calibrated(model, **inputs).convert()
    for block in BLOCKS:
        for name in ("conv_inverted", "conv_point"):
            assert isinstance(model.get_submodule(f"{block}.{name}").linear, QuantLinear)
    pq_fx.save(model, tmp_path / "sana")
    fresh, _ = sana(5)
    pq_fx.load(tmp_path / "sana", fresh)
    with torch.no_grad():
        got, same = model(**inputs).sample, fresh(**inputs).sample
        want = wanted(**inputs).sample
    assert torch.equal(got, same)
    assert 0 < ((got - want).norm() / want.norm()).item() < 0.5


def test_a_failed_convert_leaves_convolutions() -> None:
    torch.manual_seed(2)
    model, x = Net().eval(), torch.randn(1, 3, 4, 4)
    quantizer = calibrated(model, x)
    for moments in quantizer.statistics().moments.values():
        moments.amax.fill_(float("nan"))
    with pytest.raises(CalibrationError):
        quantizer.convert()
    assert type(model.widen) is nn.Conv2d and list(model.state_dict()) == list(Net().state_dict())
