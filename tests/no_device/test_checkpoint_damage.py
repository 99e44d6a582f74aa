"""What must be refused while loading, with the model untouched."""

from __future__ import annotations

import json
import os

import pytest
import torch
from checkpoints import (
    INNER,
    WEIGHTS,
    WIDTH,
    Toy,
    edit_config,
    edit_tensors,
    quantized_toy,
    refused,
    report,
)
from torch import nn

from pq_fx import applied, storage
from pq_fx.checkpoint import load, save
from pq_fx.errors import CheckpointError
from pq_fx.report import Report


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order.0.first.weight", torch.zeros(WIDTH, dtype=torch.int32)),
        ("order.0.first.weight", torch.arange(WIDTH)),
        ("factor.0.first.weight", torch.full((WIDTH,), float("nan"))),
        ("factor.0.first.weight", torch.zeros(WIDTH)),
        ("factor.x.first.weight", torch.ones(WIDTH)),
        ("offset.0.first.bias", torch.full((WIDTH,), float("inf"))),
        ("rotation.0.first.weight", torch.ones(WIDTH)),
        ("factor.0", torch.ones(WIDTH)),
        ("factor.\u00b2.first.weight", torch.ones(WIDTH)),  # a digit to str.isdigit, not to int
    ],
)
def test_a_damaged_record(saved, name, value):
    _, folder = saved
    edit_tensors(folder, lambda tensors: tensors.update({applied.PREFIX + name: value}))
    refused(folder, "no edit of an axis")


@pytest.mark.parametrize("name", ["0.nowhere.weight", "2.first.weight", "1.first.weight"])
def test_a_record_of_another_model(saved, name):
    _, folder = saved
    edit_tensors(folder, lambda t: t.update({f"{applied.PREFIX}factor.{name}": torch.ones(WIDTH)}))
    refused(folder, "record of folds has 64 channels on axis")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_cut_off_file(saved, keep):
    _, folder = saved
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "cut off or changed")
    # Even where the recorded size and checksum say otherwise.
    recorded = {"bytes": file.stat().st_size, "sha256": storage.sha256(file)}
    edit_config(folder, lambda config: config["weights"].update({WEIGHTS: recorded}))
    refused(folder, "cannot be read")


def test_a_flipped_bit(saved):
    _, folder = saved
    file = folder / WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 4
    file.write_bytes(raw)
    refused(folder, "checksum")


def test_missing_files(saved, tmp_path):
    _, folder = saved
    refused(tmp_path / "nowhere", "holds no config.json")
    (folder / WEIGHTS).unlink()
    refused(folder, "cannot be read")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format_version=4), "version 4; this release reads 2 and 3. Upgrade"),
        (lambda c: c.update(format_version=2), "checksum does not belong to that version"),
        (lambda c: c.update(format_version=True), "format_version True"),
        (lambda c: c.update(format_version=1), "Version 1 was never released: quantize"),
        (lambda c: c.update(format_version=None), "format_version None"),
        (lambda c: c.update(quant_method="bitsandbytes"), "bitsandbytes"),
        (lambda c: c.pop("layers"), "no table 'layers'"),
        (lambda c: c.update(layers={}), "lists no layers"),
        (lambda c: c["layers"]["q"].pop("bias"), r"layers\['q'\].*expected.*bias"),
        (lambda c: c["layers"].update(q=5), r"layers\['q'\] in config.json has 5; expected the"),
        (lambda c: c["layers"]["q"].update(bias=1), "bias is 1; expected bool"),
        (lambda c: c.update(tied=["a"]), "expected a table of names"),
        (lambda c: c["layers"]["q"].update(in_features=True), "in_features is True"),
        (lambda c: c["layers"]["q"].update(weight_format="int5:64:bf16"), "q: unknown format"),
        (lambda c: c["layers"]["q"].update(in_features=100), "not a multiple"),
        (lambda c: c["layers"]["q"].update(out_features=100), "64 x 100 in the checkpoint"),
        (lambda c: c["layers"]["q"].update(input_quantizer="z"), "no input quantizer 'z'"),
        (lambda c: c["layers"]["q"].update(input_quantizer="down.input_quantizer"), "192"),
        (lambda c: c["layers"]["down"].update(input_quantizer=None), "of no layer"),
        (lambda c: c["layers"].update(z=c["layers"]["q"]), "'z'; Toy has none"),
        (lambda c: c["layers"].update(norm=c["layers"]["q"]), "norm is LayerNorm"),
        (lambda c: c["layers"].pop("head"), "lacks tensors.*|unknown to the model"),
        (lambda c: c["input_quantizers"]["q.input_quantizer"].update(rotation=24), "rotation 24"),
        (lambda c: c["input_quantizers"]["q.input_quantizer"].update(perm=False), "unknown to"),
        (lambda c: c.pop("weights"), "does not describe"),
        (lambda c: c.update(weights={}), "does not describe"),
        (lambda c: c["weights"].update({"../../x": {}}), "does not describe"),
        (lambda c: c["weights"].update({WEIGHTS: None}), "does not describe"),
        (lambda c: c["weights"][WEIGHTS].pop("sha256"), "checksum"),
    ],
)
def test_a_config_that_lies(saved, change, says):
    _, folder = saved
    edit_config(folder, change)
    refused(folder, says)


def test_a_config_that_is_no_json(saved):
    _, folder = saved
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    refused(folder, "quant_method None")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}']
)
def test_a_damaged_report(saved, text):
    _, folder = saved
    file = folder / "quantization_report.json"
    whole = file.read_text()
    file.write_text(whole.replace('"weight_bytes": 1', '"weight_bytes": 2'))
    refused(folder, "quantization_report.json does not have the checksum")
    file.write_text(text)
    refused(folder, "quantization_report.json cannot be read")
    plain = json.loads(whole)
    del plain["sha256"]  # as older releases wrote it
    file.write_text(json.dumps(plain))
    assert Report.of_model(load(folder, Toy())) == report()


def test_a_changed_setting(saved):
    """Each of these is a whole number or name that would load, and give other numbers."""
    _, folder = saved
    file = folder / "config.json"
    text = file.read_text()
    for old, new in (
        ('"rotation": 16', '"rotation": 32'),
        ('"_class_name": "Toy"', '"_class_name": "Top"'),
        ('"format": "int4:64:bf16"', '"format": "int4:32:bf16"'),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        refused(folder, "does not have the checksum that it names")
    file.write_text(json.dumps(json.loads(text) | {"_diffusers_version": "9.9"}))
    load(folder, Toy())  # bookkeeping, and the layout of the text, may change


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_file(saved):
    """Opening a FIFO would wait for ever."""
    _, folder = saved
    for name in ("quantization_report.json", "config.json", WEIGHTS):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        if name == WEIGHTS:
            edit_config(folder, lambda config: config["weights"][WEIGHTS].update(bytes=0))
        refused(folder, "cannot be read: it is not a regular file")
        (folder / name).unlink()
        (folder / name).write_bytes(kept)


def set_item(name, index, value):
    def change(tensors):
        tensors[name].view(-1)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_item("q.input_quantizer.perm", 3, 1_000), "q.input_quantizer.perm is no permutation"),
        (set_item("q.input_quantizer.perm", 3, -1), "no permutation"),
        (lambda t: t["q.input_quantizer.perm"].copy_(torch.zeros(WIDTH)), "no permutation"),
        (set_item("q.weight_scale", 3, float("nan")), "q.weight_scale .*not finite"),
        (set_item("down.weight_scale", 0, float("-inf")), "not finite"),
        (set_item("down.weight_scale", 0, 0.0), "not above 0"),
        (set_item("q.weight_scale", 7, -0.5), "not above 0"),
        (lambda t: t.pop("norm.weight"), "lacks tensors of the model: norm.weight"),
        (lambda t: t.pop("q.bias"), "lacks.*q.bias"),
        (lambda t: t.update(odd=torch.zeros(1)), "unknown to the model: odd"),
        (lambda t: t.update({"q.weight": t["q.weight"][:-1]}), r"q.weight is uint8 \[191, 32\]"),
        (lambda t: t.update({"q.weight": t["q.weight"].int()}), "expected uint8"),
        (lambda t: t.update({"q.bias": t["q.bias"].int()}), "expected a float type"),
        (lambda t: t.update(steps=t["steps"].float()), "expected int64"),
        (lambda t: t.update({"norm.weight": torch.ones(WIDTH + 1)}), r"norm.weight.*\[65\]"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, says):
    _, folder = saved
    edit_tensors(folder, change)
    refused(folder, says)


@pytest.mark.parametrize(
    ("fmt", "name", "bad"),
    [("mxfp4:32:e8m0", "q.weight_scale", 255), ("nvfp4:16:e4m3", "q.weight_scale", 127)],
)
def test_scales_that_are_no_numbers_in_their_own_dtype(tmp_path, fmt, name, bad):
    save(quantized_toy(fmt, fmt), tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: t[name].view(torch.uint8).view(-1)[3:4].fill_(bad))
    refused(tmp_path / "m", "not finite")


def test_scales_with_a_sign_are_not_zero(tmp_path):
    model = quantized_toy("int4f:64:bf16", "int4f:64:bf16")
    assert (model.q.weight_scale < 0).any() and (model.q.weight_scale > 0).any()
    save(model, tmp_path / "m")
    edit_tensors(tmp_path / "m", set_item("q.weight_scale", 3, 0.0))
    refused(tmp_path / "m", "q.weight_scale holds values that are not finite or 0")


def test_global_scales_are_checked_too(tmp_path):
    save(quantized_toy("nvfp4:16:e4m3", "nvfp4:16:e4m3"), tmp_path / "m")
    name = "q.input_quantizer.global_scale"
    edit_tensors(tmp_path / "m", lambda t: t[name].fill_(float("inf")))
    refused(tmp_path / "m", name)


def test_another_architecture(saved):
    _, folder = saved
    refused(folder, "down is 192 x 64 in the checkpoint and 128 x 64", Toy(inner=128))
    refused(folder, "lacks tensors of the model: again.weight", Toy(tied=False))
    refused(folder, "nn.Linear|none of that name", nn.Linear(4, 4))
    no_bias = Toy()
    no_bias.q = nn.Linear(WIDTH, INNER, bias=False)
    refused(folder, "q has a bias in the checkpoint", no_bias)


def test_meta_tensors_outside_the_state_dict_cannot_be_filled(tmp_path):
    class WithTable(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4), persistent=False)

    model = quantized_toy()
    save(model, tmp_path / "m")
    load(tmp_path / "m", WithTable())
    with torch.device("meta"):
        empty = WithTable()
    with pytest.raises(CheckpointError, match=r"table: on the meta device"):
        load(tmp_path / "m", empty)
    assert isinstance(empty.q, nn.Linear)
