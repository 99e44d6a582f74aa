"""State dicts of a quantized model: what does not fit is refused before anything changes."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import toy
from safetensors.torch import load_file, save_model
from toy import CONFIG, bytes_of, out, quantized, rows

import pq_fx
from pq_fx.errors import CheckpointError


def other_conversion(seed: int = 3) -> toy.Toy:
    """The toy, calibrated on other rows: the same formats, other folds."""
    model = toy.toy()
    quantizer = pq_fx.prepare(model, CONFIG)
    with torch.no_grad(), quantizer.calibrate(progress=False):
        model(5 * rows(seed) ** 3)
    quantizer.convert()
    return model


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_float_state_dict_changes_nothing(assign: bool, strict: bool) -> None:
    model = quantized(toy.toy())
    before, want = bytes_of(model), out(model)
    with pytest.raises(
        CheckpointError, match=r"does not fit Toy, which is unchanged.*and \d+ more"
    ):
        model.load_state_dict(toy.toy(1).state_dict(), strict=strict, assign=assign)
    assert bytes_of(model) == before and torch.equal(out(model), want)


def test_another_conversion_of_the_same_model_is_refused() -> None:
    model, other = quantized(toy.toy()), other_conversion()
    before, want = bytes_of(model), out(model)
    with pytest.raises(CheckpointError, match=r"of another conversion of this model"):
        model.load_state_dict(other.state_dict())
    assert bytes_of(model) == before
    assert torch.equal(out(model), want)


@pytest.mark.parametrize("assign", [False, True])
def test_one_without_metadata_is_told_by_its_packed_weights(assign: bool, tmp_path) -> None:
    """A plain dict, or one read from safetensors: formats, names and shapes agree, the order of channels does not."""
    model = quantized(toy.toy())
    before, want = bytes_of(model), out(model)
    rotated = quantized(toy.toy(), dataclasses.replace(CONFIG, method="permuquant-h"))
    save_model(other_conversion(), tmp_path / "s")
    for state in (dict(other_conversion().state_dict()), load_file(tmp_path / "s")):
        with pytest.raises(CheckpointError, match=r"other packed weights than this model, and"):
            model.load_state_dict(state, strict=False, assign=assign)
    with pytest.raises(CheckpointError, match=r"other packed weights"):
        model.load_state_dict(dict(rotated.state_dict()), strict=False, assign=assign)
    assert bytes_of(model) == before and torch.equal(out(model), want)
    save_model(model, tmp_path / "s")
    model.load_state_dict(load_file(tmp_path / "s"), strict=False)
    assert torch.equal(out(model), want)
    with pytest.raises(RuntimeError, match="other packed weights"):
        torch.nn.Sequential(model).load_state_dict(
            {f"0.{name}": value for name, value in rotated.state_dict().items()}, strict=False
        )


def test_state_dicts_of_the_same_conversion_load(tmp_path) -> None:
    model = quantized(toy.toy())
    want = out(model)
    pq_fx.save(model, tmp_path / "q")
    loaded = pq_fx.load(tmp_path / "q", toy.toy(1))
    again = quantized(toy.toy())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    by_torch = torch.load(file, weights_only=True)
    for other in (loaded, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for state in (model.state_dict(), by_torch, dict(model.state_dict())):
            with torch.no_grad():
                other.outside.weight.zero_()
            other.load_state_dict(state)
            assert torch.equal(out(other), want)
            model.load_state_dict(other.state_dict())
    old = model.state_dict()  # as a release wrote it that knew no conversions
    for settings in old._metadata.values():
        settings.get("permuquant", {}).pop("conversion", None)
    model.load_state_dict(old)
    wrapped = torch.nn.Sequential(model)
    with pytest.raises(RuntimeError, match="another conversion"):
        wrapped.load_state_dict(torch.nn.Sequential(other_conversion()).state_dict())
    pq_fx.dequantize(model)
    model.load_state_dict(toy.toy(1).state_dict())
    assert torch.equal(out(model), out(toy.toy(1)))
