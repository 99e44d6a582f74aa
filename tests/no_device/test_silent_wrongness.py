"""What gives wrong numbers without an error elsewhere: each case is right here, or raises by name."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import re

import pytest
import torch
import toy
from torch import Tensor, nn
from toy import (
    CONFIG,
    SAME,
    WIDTH,
    Toy,
    bytes_of,
    calibrated,
    lowered,
    out,
    quantized,
    relative,
    rows,
)

import pq_fx
from pq_fx.errors import CalibrationError, PQError
from pq_fx.modules import QuantLinear, quantized_linears

# One graph, many modules -------------------------------------------------------------------------


def test_twins_share_compiled_code_and_nothing_else() -> None:
    models = [quantized(toy.toy(seed)) for seed in (0, 1)]
    toy.compiled.clear()
    for model in models * 2:
        assert relative(out(lowered(model)), out(model)) < SAME
    assert relative(out(models[0]), out(models[1])) > 0.5


def test_twelve_blocks_run_one_graph_with_their_own_weights() -> None:
    config = pq_fx.QuantConfig(
        "int4", group_size=16, method="rtn"
    )  # the same fields in every block
    model = quantized(toy.toy(blocks=12), config)
    want = out(model)
    toy.compiled.clear()
    for block in model.blocks:
        block.compile(backend=toy.lowering_backend, fullgraph=True)
    assert relative(out(model), want) < SAME
    assert len(toy.compiled) == 1


def test_first_calls_of_twins_or_blocks_name_the_way_that_works() -> None:
    options = CONFIG.to_dict() | {"calibration_steps": 2}
    for pair in ([toy.toy(0), toy.toy(1)], list(toy.toy(0).blocks)):
        wide = 8 if isinstance(pair[0], Toy) else WIDTH
        first, second = (
            torch.compile(m, backend="permuquant", options=dict(options)) for m in pair
        )
        with torch.no_grad():
            first(torch.randn(2, 3, wide))
            with pytest.raises(CalibrationError, match=r"of one class.*pq_fx\.prepare"):
                second(torch.randn(2, 3, wide))
        assert not any(quantized_linears(m) for m in pair)


def test_a_shared_weight_is_left_in_float_under_both_names() -> None:
    model = toy.toy()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    model.blocks[1].norm2.weight = model.blocks[0].norm2.weight
    float_model = copy.deepcopy(model)
    report = calibrated(model).convert()
    reasons = {row.fqn: row.skip_reason for row in report.layers}
    assert reasons["blocks.0.up"] == "its weight is used by two linears"
    assert reasons["blocks.1.up"] == "its weight is another linear's"
    assert model.blocks[0].up.weight is model.blocks[1].up.weight
    assert 0 < relative(out(model), out(float_model)) < 0.5
    assert set(reasons) == {n for n, m in float_model.named_modules() if type(m) is nn.Linear}


class Branches(nn.Module):
    """A second way through scales the channels between two linears, so they cannot be reordered there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy.toy()

    def forward(self, x: Tensor, ramp: bool = False) -> Tensor:
        block = self.inner.blocks[0]
        hidden = nn.functional.gelu(block.up(block.norm2(self.inner.inside(x))), approximate="tanh")
        if ramp:
            hidden = hidden * torch.linspace(0, 2, 2 * WIDTH)
        return self.inner.outside(block.down(hidden))


def absorbed(report: pq_fx.Report) -> str:
    return next(row.absorb for row in report.layers if row.fqn == "inner.blocks.0.down")


def test_two_ways_through_a_model_take_the_fold_away() -> None:
    one, both = Branches().eval(), Branches().eval()
    float_model = copy.deepcopy(both)
    assert absorbed(calibrated(one).convert()) == "fold"
    quantizer = pq_fx.prepare(both, CONFIG)
    with torch.no_grad(), quantizer.calibrate():
        for i in range(2):
            both(rows(i))
            both(rows(i), ramp=True)
    assert absorbed(quantizer.convert()) == "quantize"
    with torch.no_grad():
        for ramp in (False, True):
            assert relative(both(rows(5), ramp), float_model(rows(5), ramp)) < 0.4


def test_a_tensor_shared_with_another_model_is_not_reordered_there() -> None:
    """A fold writes to a float linear that stays: `up` is left alone by a rule."""
    model, other = toy.toy(0), toy.toy(1)
    other.blocks[0].up.weight = model.blocks[0].up.weight
    other.blocks[0].up.bias = model.blocks[0].up.bias
    want, before = out(other), out(model)
    config = dataclasses.replace(CONFIG, rules={"blocks.0.up": None})
    report = calibrated(model, config).convert()
    assert next(r.absorb for r in report.layers if r.fqn == "blocks.0.down") == "fold"
    assert torch.equal(out(other), want)
    assert relative(out(model), before) < 0.5


# Values that change after conversion --------------------------------------------------------------


def test_new_values_reach_the_compiled_model() -> None:
    model = quantized(toy.toy())
    compiled = lowered(model)
    first = out(compiled)
    new = model.state_dict()  # with PyTorch's metadata: a plain dict may not change codes
    for name, value in new.items():
        if name.endswith((".weight", "weight_scale")):
            new[name] = value.flip(0)
    model.load_state_dict(new, assign=True)
    assert relative(out(compiled), out(model)) < SAME and relative(out(compiled), first) > 0.5
    up = model.blocks[0].up
    up.weight = nn.Parameter(up.weight.flip(0), requires_grad=False)
    assert relative(out(compiled), out(model)) < SAME
    with torch.no_grad():
        before = out(compiled)
        up.weight.copy_(up.weight.flip(1))
        model.outside.weight.mul_(2)
    assert relative(out(compiled), out(model)) < SAME and relative(out(compiled), before) > 0.5


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_float_state_dict_does_not_become_codes(assign: bool, strict: bool) -> None:
    """8-bit codes have the shape of the float weight, so PyTorch alone would copy it into them."""
    model = quantized(toy.toy(), pq_fx.QuantConfig("fp8", method="rtn"))
    before = {n: copy.deepcopy(m.state_dict()) for n, m in quantized_linears(model).items()}
    with pytest.raises(
        RuntimeError, match=r"up\.weight is torch\.float32 .* expected torch\.uint8"
    ):
        model.load_state_dict(toy.toy(1).state_dict(), strict=strict, assign=assign)
    for name, linear in quantized_linears(model).items():
        for key, value in linear.state_dict().items():
            if key != "bias":
                assert value.dtype == before[name][key].dtype
                assert torch.equal(value.float(), before[name][key].float())


def test_a_state_dict_of_another_rotation_or_format_is_refused() -> None:
    sorts, rotates = (
        quantized(toy.toy(), pq_fx.QuantConfig("int4", group_size=16, method=method))
        for method in ("rtn", "convrot")
    )
    with pytest.raises(RuntimeError, match=r"'rotation': 16.* in the state dict.*'rotation': 0"):
        sorts.load_state_dict(rotates.state_dict())
    grouped = quantized(toy.toy(), pq_fx.QuantConfig("int4:16:pow2", method="rtn"))
    with pytest.raises(RuntimeError, match=r"int4:16:pow2.* in the state dict.*int4:16:bf16"):
        sorts.load_state_dict(grouped.state_dict())
    bare = dict(rotates.state_dict())  # without metadata only shapes and dtypes can tell
    assert not rotates.load_state_dict(bare).missing_keys


def test_statistics_of_another_model_are_refused() -> None:
    statistics = calibrated(toy.toy(blocks=3)).statistics()
    other = toy.toy()
    with pytest.raises(CalibrationError, match="another model"):
        pq_fx.prepare(other, CONFIG, statistics=statistics).convert()
    wide = toy.toy(blocks=3)
    wide.blocks[0].up, wide.blocks[0].down = nn.Linear(WIDTH, 192), nn.Linear(192, WIDTH)
    with pytest.raises(CalibrationError, match="another model"):
        pq_fx.prepare(wide, CONFIG, statistics=statistics).convert()
    assert not quantized_linears(other) and not quantized_linears(wide)


def test_a_parameter_replaced_while_calibrating_is_named() -> None:
    model = toy.toy()
    quantizer = pq_fx.prepare(model, CONFIG)
    with torch.no_grad(), quantizer.calibrate():
        model(rows(0))
        up = model.blocks[0].up
        up.weight = nn.Parameter(torch.randn_like(up.weight))
        with pytest.raises(CalibrationError, match="a parameter was replaced"):
            model(rows(1))


def test_a_linear_that_no_call_reached_is_reported() -> None:
    model = toy.toy()
    model.unused = nn.Linear(WIDTH, WIDTH)
    report = calibrated(model).convert()
    assert report.layers[-1].fqn == "unused"
    assert report.layers[-1].skip_reason == "no call of the calibration reached it"


# The model as a Python object ---------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4:16:bf16", "nvfp4", "mxfp4", "fp8"])
def test_casts_and_copies_keep_the_packed_bytes(fmt: str) -> None:
    model = quantized(toy.toy(), pq_fx.QuantConfig(fmt))
    want, before = out(model), bytes_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "torch.save": torch.load(file, weights_only=False),
    }
    if fmt != "nvfp4":  # PyTorch cannot pickle a bare float8 tensor, which nvfp4's scales are
        copies["pickle"] = pickle.loads(pickle.dumps(model))
    for how, other in copies.items():
        assert torch.equal(out(other), want), how
        assert other.blocks[0].q.input_quantizer is other.blocks[0].k.input_quantizer, how
    packed = [n for n in before if re.search(r"weight_|perm$|_scale$", n)]
    packed += [f"{name}.weight" for name in quantized_linears(model)]
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        cast(model)
        after = bytes_of(model)
        assert all(after[name] == before[name] for name in packed)
        with torch.no_grad():
            dtype = model.outside.weight.dtype
            y = model(rows(5, dtype=dtype))
        assert y.dtype == dtype
        # A value rounded to 16 bits moves codes of later layers; another function would give 1.4.
        assert relative(y.to(want.dtype), want) < 0.5


def test_a_model_that_is_moved_away_and_back() -> None:
    model = quantized(toy.toy())
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    moved.load_state_dict(model.state_dict())
    assert bytes_of(moved) == bytes_of(model)
    assert moved.blocks[0].q.input_quantizer is moved.blocks[0].k.input_quantizer
    assert torch.equal(out(moved), out(model))
    assert relative(out(lowered(moved)), out(model)) < SAME


def test_train_mode_says_inference_only_and_stays_safe() -> None:
    model = quantized(toy.toy())
    want = out(model)
    with pytest.raises(PQError, match="inference only"):
        model.train()
    for call in (
        model,
        lowered(model),
    ):  # PyTorch has set the flags of modules around: no call may pass
        with pytest.raises(Exception, match="inference only"):
            out(call)
    torch._dynamo.reset()
    assert torch.equal(out(model.eval()), want)


@pytest.mark.parametrize("fmt", ["int4", "nvfp4", "mxfp4", "fp8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_is_refused_not_partial(fmt: str, compiled: bool) -> None:
    """Behind a residual a branch without gradient gives a wrong one, not none."""
    model = quantized(toy.toy(blocks=1), pq_fx.QuantConfig(fmt, method="rtn"))
    x = rows(3).requires_grad_()
    y = (torch.compile(model, backend="aot_eager") if compiled else model)(x)
    assert relative(y, out(model, 3)) < SAME
    with pytest.raises(PQError, match="inference only"):
        y.sum().backward()
    assert x.grad is None


def test_grad_modes_mix() -> None:
    model = toy.toy(blocks=1)
    quantizer = pq_fx.prepare(model, CONFIG)
    with quantizer.calibrate():
        for i, mode in enumerate((torch.inference_mode, torch.no_grad, torch.enable_grad)):
            with mode():
                model(rows(i))
    with torch.inference_mode():
        quantizer.convert()
    assert not any(p.is_inference() for p in model.parameters())
    compiled = lowered(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert relative(compiled(rows(5)), model(rows(5))) < SAME
    model.load_state_dict(model.state_dict())
    plain = toy.toy(blocks=1)
    quantizer = pq_fx.prepare(plain, CONFIG)
    with torch.no_grad(), quantizer.calibrate():
        for i in range(3):
            plain(rows(i))
    quantizer.convert()
    assert bytes_of(plain) == bytes_of(model)


# What is left in float ------------------------------------------------------------------------------


def test_every_linear_is_a_quantlinear_or_in_the_report_with_a_reason() -> None:
    model = toy.toy()
    report = calibrated(model).convert()
    for name, module in model.named_modules():
        row = next((r for r in report.layers if r.fqn == name), None)
        if isinstance(module, QuantLinear):
            assert row is not None and row.quantized
        elif type(module) is nn.Linear:
            assert row is not None and row.skip_reason


@pytest.mark.parametrize("own", [{"activation_format": None}, {"activation_format": "int8"}])
def test_points_of_one_region_with_formats_of_their_own(own: dict[str, object]) -> None:
    """Blocks share the residual stream, hence a region: a rotation of one is not for the other's 16-bit inputs."""
    model = toy.toy()
    want = model(toy.rows(0)).detach()
    config = pq_fx.QuantConfig(
        "int8",
        activation_format="int4:16:bf16",
        group_size=16,
        method="permuquant-h",
        calibration_rows=64,
        rules={r"re:blocks\.1\..*": own},
    )
    report = toy.calibrated(model, config).convert()
    rotations = {row.fqn: row.rotation for row in report.layers if row.quantized}
    assert rotations["blocks.0.q"] == 16
    if own["activation_format"] is None:
        assert {r for n, r in rotations.items() if n.startswith("blocks.1.")} == {0}
    with torch.no_grad():
        got = model(toy.rows(0))
    assert float((got - want).norm() / want.norm()) < 0.3  # 1.0 where weights alone were rotated
