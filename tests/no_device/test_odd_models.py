"""Odd models and odd surroundings: right, or a named error, and nothing changed."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import toy
from torch import nn
from toy import CONFIG, SAME, bytes_of, calibrated, lowered, out, quantized, relative, rows

import pq_fx
from pq_fx.errors import CalibrationError
from pq_fx.modules import QuantLinear, quantized_linears

ROUNDING = 0.4  # int4 of the toy; other channels give about 1.4


@pytest.mark.parametrize("fmt", ["int4", "fp8"])  # fp8 codes have the shape of the float weight
def test_two_quantizers_on_one_model(fmt: str) -> None:
    config = pq_fx.QuantConfig(fmt, method="permuquant", calibration_rows=64)
    model = toy.toy()
    first, second, third = (
        calibrated(model, config),
        calibrated(model, config),
        pq_fx.prepare(model, config),
    )
    first.convert()
    before, record = bytes_of(model), model.permuquant_edits
    with pytest.raises(CalibrationError, match=r"Toy is converted already \(blocks.0.q is quant"):
        second.convert()
    with pytest.raises(CalibrationError, match="Toy is converted already"), third.calibrate():
        pass
    assert bytes_of(model) == before and model.permuquant_edits is record
    pq_fx.dequantize(model)
    weights = (m.blocks[0].down.weight for m in (model, toy.toy()))
    assert relative(*weights) < 0.2


def test_an_adapter_that_was_there_before() -> None:
    model = toy.toy()
    settings = peft.LoraConfig(target_modules=["up", "q"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)
    want = out(model)
    with pytest.raises(
        CalibrationError, match=r"blocks\.0\.q carries a LoRA adapter.*load it again"
    ):
        calibrated(model)
    assert torch.equal(out(model), want) and not quantized_linears(model)


def test_models_without_data() -> None:
    with torch.device("meta"):
        model = toy.Toy().eval()
    quantizer = pq_fx.prepare(model, CONFIG)
    with (
        pytest.raises(CalibrationError, match=r"inside\.weight is on the meta device"),
        quantizer.calibrate(),
    ):
        pass
    gathered = calibrated(toy.toy()).statistics()
    with pytest.raises(CalibrationError, match=r"inside\.weight is on the meta device"):
        pq_fx.prepare(model, CONFIG, statistics=gathered).convert()
    assert not quantized_linears(model)


def test_sharded_parameters(tmp_path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = fully_shard(toy.toy(), mesh=mesh)
        with pytest.raises(CalibrationError, match="is a DTensor and no plain tensor"):
            calibrated(sharded)
        model = toy.toy()
        want = out(model)
        replicas = nn.parallel.DistributedDataParallel(model)
        calibrated(replicas).convert()
        assert relative(out(replicas), want) < ROUNDING
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["permuquant", "convrot"])
def test_autocast_around_calls(method: str) -> None:
    """The float parts compute in bf16, the packed linears as without: a rotation or a product would lose bits."""
    model = quantized(toy.toy(), pq_fx.QuantConfig("int4", group_size=16, method=method))
    compiled, x = lowered(model), torch.randn(3, toy.WIDTH)
    up = model.blocks[0].up
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, eager, run = up(x), model(rows(5)), compiled(rows(5))
    assert torch.equal(got, up(x).detach())
    assert relative(run.float(), eager.float()) < SAME
    assert eager.dtype == torch.bfloat16 and relative(eager.float(), out(model)) < ROUNDING


def test_autocast_around_calibration() -> None:
    model = toy.toy()
    want = out(model)
    quantizer = pq_fx.prepare(model, CONFIG)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), quantizer.calibrate():
        model(rows(0))
    report = quantizer.convert()
    assert len(report.quantized) == 12 and relative(out(model), want) < ROUNDING
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(rows(5)).float(), want) < ROUNDING


@pytest.mark.parametrize(
    "change", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm]
)
def test_weights_that_are_computed_stay_float(change) -> None:
    model = toy.toy()
    change(model.blocks[0].up)
    want = out(model)
    report = calibrated(model).convert()
    assert not isinstance(model.blocks[0].up, QuantLinear) and len(report.quantized) == 11
    assert relative(out(model), want) < ROUNDING


def test_copies_and_inference_tensors_while_calibrating() -> None:
    with torch.inference_mode():
        model, inputs = toy.toy(), [rows(i) for i in range(2)]
    want = out(model)
    quantizer = pq_fx.prepare(model, CONFIG)
    with torch.no_grad(), quantizer.calibrate():
        for x in inputs:
            model(x)
        copied = copy.deepcopy(model)
        assert torch.equal(out(copied), want)
    assert quantizer.calls == 2
    quantizer.convert()
    assert relative(out(model), want) < ROUNDING and torch.equal(out(copied), want)


def test_compiled_twice_and_within() -> None:
    model = quantized(toy.toy())
    want = out(model)
    assert relative(out(lowered(lowered(model))), want) < SAME
    for block in model.blocks:
        block.compile(backend=toy.lowering_backend)
    assert relative(out(lowered(model)), want) < SAME


def test_a_quantizer_inside_another_ones_calibration() -> None:
    model = toy.toy()
    outer, inner = pq_fx.prepare(model, CONFIG), pq_fx.prepare(model, CONFIG)
    with (
        pytest.raises(CalibrationError, match="was not called inside"),
        outer.calibrate(),
        inner.calibrate(),
        torch.no_grad(),
    ):
        model(rows(0))
    assert (outer.calls, inner.calls) == (0, 1)
    inner.convert()
    assert quantized_linears(model)
