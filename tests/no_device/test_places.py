"""A part that a model holds more than once, or in a plain attribute, is replaced everywhere, or by name not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
import toy
from torch import Tensor, nn
from toy import CONFIG, SAME, WIDTH, calibrated, lowered, out, relative

import pq_fx
from pq_fx.errors import CalibrationError, CheckpointError
from pq_fx.modules import QuantLinear, quantized_linears
from pq_fx.places import Places

ROUNDING = 0.4  # int4 of the toy; a float linear on reordered channels gives about 1


class Held(nn.Module):
    """A block's `up` under another name too, and run by the one that `run` finds."""

    def __init__(self, keep: Callable[[Any, nn.Module], None], run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner = toy.toy()
        keep(self, self.inner.blocks[0].up)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        block = self.inner.blocks[0]
        x = self.inner.inside(x)
        h = nn.functional.gelu(self.run(self)(block.norm2(x)), approximate="tanh")
        return self.inner.outside(x + block.down(h))


class First(Held):
    """The second name comes before the block's own in the model's order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        inner = self._modules.pop("inner")
        self._modules["inner"] = inner


def child(self: Any, up: nn.Module) -> None:
    self.other = up


def twins(self: Any, up: nn.Module) -> None:
    self.several = nn.ModuleList([up, up])


def plain_list(self: Any, up: nn.Module) -> None:
    self.plain = [None, {"up": [up]}]


def attribute(self: Any, up: nn.Module) -> None:
    self.__dict__["hidden"] = up


WAYS = {
    "child": (child, lambda m: m.other),
    "twins": (twins, lambda m: m.several[1]),
    "list": (plain_list, lambda m: m.plain[1]["up"][0]),
    "attribute": (attribute, lambda m: m.hidden),
    "own": (child, lambda m: m.inner.blocks[0].up),
}


@pytest.mark.parametrize("cls", [Held, First])
@pytest.mark.parametrize("way", WAYS)
def test_a_linear_that_is_held_twice(way: str, cls: type[Held], tmp_path: Path) -> None:
    model = cls(*WAYS[way]).eval()
    want, float_model = out(model), copy.deepcopy(model)
    report = calibrated(model).convert()
    assert next(r.absorb for r in report.layers if r.fqn.endswith("blocks.0.down")) == "fold"
    assert isinstance(WAYS[way][1](model), QuantLinear)
    assert WAYS[way][1](model) is model.inner.blocks[0].up
    got = out(model)
    assert relative(got, want) < ROUNDING
    assert relative(out(lowered(model)), got) < SAME
    assert torch.equal(out(copy.deepcopy(model)), got)
    pq_fx.save(model, tmp_path / "q")
    other = cls(*WAYS[way]).eval()
    assert torch.equal(out(pq_fx.load(tmp_path / "q", other)), got)
    for back in (model, other):
        pq_fx.dequantize(back)
        assert not any(isinstance(m, QuantLinear) for m in (*back.modules(), WAYS[way][1](back)))
        assert relative(out(back), want) < ROUNDING
        weights = back.inner.blocks[0].down.weight, float_model.inner.blocks[0].down.weight
        assert relative(*weights) < ROUNDING  # in the float model's order again


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        (lambda self, up: setattr(self, "fixed", (up,)), "fixed"),
        (lambda self, up: setattr(self, "fixed", [{"a": {up}}]), "fixed"),
        (lambda self, up: setattr(self, "fixed", up.forward), "fixed"),
    ],
    ids=["tuple", "set", "bound method"],
)
def test_a_linear_that_cannot_be_replaced_everywhere(keep: Any, name: str, tmp_path: Path) -> None:
    model = Held(keep, lambda m: m.inner.blocks[0].up).eval()
    want = out(model)
    quantizer = calibrated(model)
    with pytest.raises(CalibrationError, match=rf"{name} holds a Linear that is to be replaced"):
        quantizer.convert()
    assert torch.equal(out(model), want) and not quantized_linears(model)
    free = Held(child, lambda m: m.other).eval()
    calibrated(free).convert()
    pq_fx.save(free, tmp_path / "q")
    with pytest.raises(CheckpointError, match=f"{name} holds a Linear"):
        pq_fx.load(tmp_path / "q", model)
    assert torch.equal(out(model), want) and not quantized_linears(model)


class Convolutions(nn.Module):
    """Convolutions with a kernel of 1, one of them run by its second name, one from a plain list."""

    def __init__(self, hold: type) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.embed, self.widen, self.narrow = (
            nn.Conv2d(n, k, 1) for n, k in ((8, 32), (32, 64), (64, 32))
        )
        self.last = nn.Conv2d(32, 8, 1)
        self.again = self.widen
        self.plain = hold([self.narrow])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.movedim(-1, 1)[..., None])
        h = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return self.last(x + self.plain[0](self.again(h).relu())).movedim(1, -1)[..., 0, :]


def test_convolutions_that_are_held_twice() -> None:
    model = Convolutions(list).eval()
    want = out(model)
    calibrated(model).convert()
    assert model.again is model.widen and isinstance(model.again.linear, QuantLinear)
    assert model.plain[0] is model.narrow and isinstance(model.narrow.linear, QuantLinear)
    assert relative(out(model), want) < ROUNDING
    pq_fx.dequantize(model)
    assert type(model.again) is nn.Conv2d is type(model.plain[0])
    assert relative(out(model), want) < ROUNDING
    with pytest.raises(CalibrationError, match="plain holds a Conv2d"):
        calibrated(Convolutions(tuple).eval())


def test_a_lora_reaches_every_place() -> None:
    pipe = pipelines.make("flux")
    model = pipe.transformer
    attention = model.transformer_blocks[0].attn
    attention.plain, model.again = [attention.to_q], attention.to_k
    quantizer = pq_fx.prepare(model, CONFIG)
    with quantizer.calibrate(progress=False):
        pipelines.call(pipe)
    quantizer.convert()
    before = attention.to_q, attention.to_k
    state = {}
    for name, linear in zip(("to_q", "to_k"), before, strict=True):
        at = f"transformer.transformer_blocks.0.attn.{name}.lora_"
        state[f"{at}A.weight"] = torch.randn(2, linear.in_features)
        state[f"{at}B.weight"] = torch.randn(linear.out_features, 2)
    model.load_lora_adapter(state, adapter_name="style")
    assert attention.plain[0] is attention.to_q is not before[0]
    assert model.again is attention.to_k is not before[1]
    model.delete_adapters("style")


def test_a_part_of_a_part_is_held_by_what_holds_it() -> None:
    """A block under two names, and one that holds the model itself: nothing is counted twice, nothing runs for ever."""
    model = toy.toy()
    model.again = model.blocks[0]
    model.plain = [model.blocks[1]]
    model.plain.append(model.plain)
    model.blocks[1].__dict__["whole"] = model
    places = Places(model)
    up = model.blocks[0].up
    assert places.of(up) == [(model.blocks[0]._modules, "up")]
    assert len(places.of(model.blocks[1])) == 2
    assert places.of(nn.Linear(WIDTH, WIDTH)) == []
    places.check(model.modules())
