"""What calibration never saw is refused by name: a tensor that only later calls have, a branch that none took."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import MODELS
from torch import nn

import pq_fx
from pq_fx.errors import CheckpointError, UnseenError
from pq_fx.seen import attached, from_config

SETTINGS = {
    "format": "int4", "group_size": 16, "weight_only_format": "int4:16:bf16", "calibration_rows": 64,
}  # fmt: skip
SAMPLES = "controlnet_block_samples"
SWITCH = "controlnet_blocks_repeat=False"  # FLUX's only one, by default


def quantized(model: nn.Module, *calls: dict, **changes: object) -> nn.Module:
    quantizer = pq_fx.prepare(model, {**SETTINGS, "tau": -1.0, **changes})
    with torch.no_grad(), quantizer.calibrate():
        for call in calls:
            model(**call)
    quantizer.convert()
    return model


def flux() -> tuple[nn.Module, dict, dict]:
    model, inputs = MODELS["flux"].tiny()
    return model, inputs, inputs | {SAMPLES: [torch.randn(2, 15, 48)]}


@torch.no_grad()
def test_a_controlnet_that_calibration_never_saw() -> None:
    model, inputs, controlled = flux()
    want = model(**controlled).sample
    quantized(model, inputs)
    model(**inputs)
    with pytest.raises(UnseenError, match=f"{SAMPLES}.*inside calibrate"):
        model(**controlled)
    with pytest.raises(UnseenError, match=SAMPLES):  # by position, too
        model(*inputs.values(), None, controlled[SAMPLES])
    # Without the refusal the numbers are wrong, and nothing says so.
    free = copy.deepcopy(model)
    pq_fx.allow_input(free, SAMPLES)
    rounding = relative(model(**inputs).sample, MODELS["flux"].tiny()[0](**inputs).sample)
    assert relative(free(**controlled).sample, want) > 3 * rounding


@torch.no_grad()
def test_a_controlnet_that_calibration_saw() -> None:
    model, inputs, controlled = flux()
    want, without = model(**controlled).sample, model(**inputs).sample
    quantized(model, inputs, controlled)
    assert relative(model(**controlled).sample, want) < 0.15
    assert relative(model(**inputs).sample, without) < 0.15


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("way", ["whole", "in place", "blocks"])
def test_compiled_models_refuse_it_too(way: str) -> None:
    model, inputs, controlled = flux()
    run: Callable = quantized(model, inputs)
    if way == "whole":
        run = torch.compile(model, backend="permuquant", fullgraph=True)
    elif way == "in place":
        model.compile(backend="permuquant", fullgraph=True)
    else:
        model.compile_repeated_blocks(backend="permuquant", fullgraph=True)
    run(**inputs)
    with pytest.raises(Exception, match=SAMPLES) as error:
        run(**controlled)
    causes = (error.value, getattr(error.value, "inner_exception", None))
    assert any(isinstance(e, UnseenError) for e in causes)
    run(**inputs)


@torch.no_grad()
def test_first_calls_record_their_inputs() -> None:
    model, inputs, controlled = flux()
    options = {**SETTINGS, "tau": -1.0, "calibration_steps": 2}
    run = torch.compile(model, backend="permuquant", options=options)
    run(**inputs)
    run(**inputs)
    assert attached(model)[0] == {*inputs, SWITCH}
    with pytest.raises(Exception, match=SAMPLES):
        run(**controlled)


@torch.no_grad()
def test_files_keep_what_was_seen(tmp_path: Path) -> None:
    model, inputs, controlled = flux()
    quantized(model, inputs)
    pq_fx.save(model, tmp_path / "q")
    loaded = pq_fx.load(tmp_path / "q", MODELS["flux"].tiny(seed=1)[0])
    of_library = type(model).from_pretrained(tmp_path / "q")
    for other in (loaded, of_library):
        assert attached(other) == attached(model)
        with pytest.raises(UnseenError, match=SAMPLES):
            other(**controlled)
    pq_fx.dequantize(loaded)
    assert attached(loaded) == (frozenset(), ())
    loaded(**controlled)
    with pytest.raises(CheckpointError, match="calibration saw"):
        from_config(model, {"seen": {"inputs": ["x"], "modules": ["no.such.module"]}})
    with pytest.raises(CheckpointError, match=r"\[\[\[\]\]\] is no list of names"):
        from_config(model, {"seen": {"inputs": [[[]]], "modules": []}})


class Branch(nn.Module):
    """A side branch that reads the middle of an MLP, when it is asked for, and a half that counts twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.side = nn.Linear(64, 32)

    def forward(
        self,
        x: torch.Tensor,
        side: bool = False,
        mask: torch.Tensor | None = None,
        **options: bool,
    ) -> torch.Tensor:
        h = self.up(self.norm(x)).relu()
        if options.get("first_half_twice"):  # no parameters of its own
            h = torch.cat([2 * h[..., :32], h[..., 32:]], -1)
        y = x + self.down(h)
        if mask is not None:
            y = y * mask
        return y + self.side(h) if side else y


@torch.no_grad()
@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_branch_that_no_call_took(compiled: bool) -> None:
    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(40, 32)
    model.up.weight *= torch.logspace(-1, 1, 64)[torch.randperm(64), None]  # so that an order pays
    quantized(model, {"x": x}, method="permuquant")
    assert attached(model) == (frozenset({"x", "side=False"}), ("side",))
    run = torch.compile(model, backend="permuquant") if compiled else model
    run(x)
    run(x, mask=torch.ones(40, 1, dtype=torch.bool))  # carries no channels
    with pytest.raises(Exception, match="called with side=True"):
        run(x, side=True)
    pq_fx.allow_input(run, "side=True")
    with pytest.raises(UnseenError, match=r"side \(Linear\) runs"):
        run(x, side=True)
    with pytest.raises(Exception, match="mask"):
        run(x, mask=torch.ones(40, 1))
    pq_fx.allow_input(run, "mask")
    assert torch.allclose(run(x, mask=torch.ones(40, 1)), run(x), atol=1e-5)


@torch.no_grad()
def test_a_branch_that_some_call_took() -> None:
    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(40, 32)
    want = model(x, side=True)
    quantized(model, {"x": x}, {"x": x, "side": True})
    assert attached(model)[1] == ()
    assert relative(model(x, side=True), want) < 0.15


def branch() -> tuple[Branch, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(40, 32)
    with torch.no_grad():
        model.up.weight *= torch.logspace(-1, 1, 64)[torch.randperm(64), None]
    return model, x


@torch.no_grad()
@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_switch_that_no_call_had(compiled: bool) -> None:
    model, x = branch()
    want = model(x, first_half_twice=True)
    quantized(model, {"x": x}, method="permuquant")
    run = torch.compile(model, backend="permuquant") if compiled else model
    run(x)
    run(x, first_half_twice=False)  # as good as not given
    with pytest.raises(Exception, match=r"first_half_twice=True, which no call") as error:
        run(x, first_half_twice=True)
    assert isinstance(getattr(error.value, "inner_exception", error.value), UnseenError)
    # Without the refusal other channels count twice, and nothing says so.
    pq_fx.allow_input(model, "first_half_twice=True")
    rounding = relative(model(x), branch()[0](x))
    assert relative(model(x, first_half_twice=True), want) > 3 * rounding


@torch.no_grad()
def test_a_switch_that_some_call_had() -> None:
    model, x = branch()
    want, plain = model(x, first_half_twice=True), model(x)
    quantized(model, {"x": x}, {"x": x, "first_half_twice": True}, method="permuquant")
    assert relative(model(x, first_half_twice=True), want) < 0.15
    assert relative(model(x), plain) < 0.15


@torch.no_grad()
def test_hidden_states_that_calibration_did_not_return() -> None:
    """They are in the folded order. What only chooses the class of the result is no switch."""
    model, inputs = MODELS["bert"].tiny()
    quantized(model, inputs)
    model(**inputs, return_dict=False)
    with pytest.raises(UnseenError, match="output_hidden_states=True"):
        model(**inputs, output_hidden_states=True)
    model.config.output_hidden_states = True
    with pytest.raises(UnseenError, match=r"config\.output_hidden_states=True"):
        model(**inputs)
    model.config.output_hidden_states = False
    model(**inputs)


@dataclasses.dataclass
class Pack:
    x: torch.Tensor
    extra: torch.Tensor | None = None
    twice: bool = False


class Cache:
    """Not a dataclass, and it holds itself."""

    def __init__(self, *values: torch.Tensor) -> None:
        self.layers, self.itself, self.full = [{"keys": v} for v in values], self, True


class Packed(nn.Module):
    """All arguments in objects; the extra meets hidden channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = branch()[0]

    def forward(self, pack: Pack, cache: Cache | None = None) -> torch.Tensor:
        h = self.inner.up(self.inner.norm(pack.x)).relu()
        h = h if pack.extra is None else h + pack.extra
        h = 2 * h if pack.twice else h
        for layer in () if cache is None else cache.layers:
            h = h + layer["keys"]
        return pack.x + self.inner.down(h)


@torch.no_grad()
@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("compiled", [False, True])
def test_tensors_and_switches_in_objects(compiled: bool) -> None:
    model, x, extra = Packed().eval(), torch.randn(40, 32), torch.randn(64)
    quantized(model, {"pack": Pack(x)}, method="permuquant")
    assert attached(model)[0] == {"pack.x", "pack.twice=False"}
    run = torch.compile(model, backend="permuquant") if compiled else model
    run(Pack(x))
    run(Pack(x), Cache())
    for name, args in {
        r"pack\.extra": (Pack(x, extra),),
        r"pack\.twice=True": (Pack(x, twice=True),),
        r"cache\.layers\.keys": (Pack(x), Cache(extra)),
    }.items():
        with pytest.raises(Exception, match=f"called with {name}") as error:
            run(*args)
        assert isinstance(getattr(error.value, "inner_exception", error.value), UnseenError)


@torch.no_grad()
def test_tensors_in_objects_that_calibration_saw() -> None:
    model, x, extra = Packed().eval(), torch.randn(40, 32), torch.randn(64)
    calls = (Pack(x, extra), Cache(extra, extra)), (Pack(x),)
    wants = [model(*call) for call in calls]
    quantized(model, *({"pack": c[0], "cache": c[-1] if len(c) > 1 else None} for c in calls))
    for call, want in zip(calls, wants, strict=True):
        assert relative(model(*call), want) < 0.15


def add(value: torch.Tensor) -> Callable:
    return lambda module, args, output: output + value


@torch.no_grad()
@pytest.mark.usefixtures("no_codegen")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_hook_that_came_later(compiled: bool) -> None:
    model, x = branch()
    quantized(model, {"x": x}, method="permuquant")
    want, handle = model(x), model.up.register_forward_hook(add(torch.linspace(-9, 9, 64)))
    run = torch.compile(model, backend="permuquant") if compiled else model
    with pytest.raises(Exception, match=r"up has a forward hook \(add\.<locals>") as error:
        run(x)
    assert isinstance(getattr(error.value, "inner_exception", error.value), UnseenError)
    copied = copy.deepcopy(model)
    pq_fx.allow_hooks(copied)
    assert relative(copied(x), want) > 0.1
    handle.remove()
    assert torch.allclose(run(x), want, atol=1e-5)
    model.register_forward_hook(add(torch.ones(32)))  # outside, in the model's own order
    assert torch.allclose(model(x), want + 1)


@torch.no_grad()
def test_a_hook_that_calibration_saw_stays_on_what_is_replaced(tmp_path: Path) -> None:
    model, x = branch()
    handle = model.up.register_forward_hook(add(torch.linspace(-9, 9, 64)))
    want = model(x)
    quantized(model, {"x": x}, method="permuquant")
    assert type(model.up).__name__ == "QuantLinear"
    assert relative(model(x), want) < 0.15
    assert relative(copy.deepcopy(model)(x), want) < 0.15
    handle.remove()
    assert relative(model(x), want) > 0.5


@torch.no_grad()
def test_hooks_of_convolutions_that_are_linears() -> None:
    """SANA's 1x1 convolutions are replaced while calibrating and by packed linears afterwards."""
    model, inputs = MODELS["sana"].tiny()
    conv, called = model.transformer_blocks[0].ff.conv_inverted, []
    conv.register_forward_hook(lambda module, args, output: called.append(output.shape))
    quantized(model, inputs)
    before = len(called)
    model(**inputs)
    assert before > 0 and len(called) == before + 1
