"""`fuse_qkv_projections()` before quantizing: one linear makes queries, keys and values, in pieces of its rows."""

from __future__ import annotations

import copy

import pytest
import torch
from check_models import MORE_THAN_ROUNDING, SETTINGS, output, plainly_rounded, relative
from models import MODELS
from random_folds import as_double, fold_at_random
from thresholds import folded_error
from torch import nn

import pq_fx

# class: what differs from the tiny configuration
FUSED = {
    "flux": {}, "flux2": {}, "sd3": {"dual_attention_layers": ()}, "pixart": {}, "wan": {}, "cogvideo": {},
    "aura": {}, "chroma": {},
}  # fmt: skip
# Fusing makes no linear, or one that the class's attention does not read.
NOT_READ = ("sana", "qwen", "hunyuan", "ltx")
FUSED_NAMES = ("to_qkv", "to_kv", "to_added_qkv")


def fused(name: str) -> tuple[nn.Module, dict]:
    case = MODELS[name]
    torch.manual_seed(0)
    model = case.build(case.tiny_config | FUSED.get(name, {}))
    for p in model.parameters():
        if not p.any():
            p.data.normal_(0, 0.1)
    model.fuse_qkv_projections()
    return model, case.tiny_inputs()


def test_every_class_that_can_fuse_is_here() -> None:
    able = {n for n, case in MODELS.items() if hasattr(case.cls, "fuse_qkv_projections")}
    assert able == {*FUSED, *NOT_READ}


@pytest.mark.parametrize("name", FUSED)
def test_random_folds_change_nothing(name: str) -> None:
    model, kwargs = fused(name)
    error, [(found, names)] = fold_at_random(model.double(), as_double(kwargs))
    assert error < folded_error(name)
    # Values leave the fused linear in a piece of its rows; the region that reads them moves that piece alone.
    rows = [
        axis.channels
        for region in found.regions
        for axis in region.axes
        if axis.axis == 0 and names[axis.param].split(".")[-2] in FUSED_NAMES
    ]
    assert rows
    for channels in rows:
        assert 0 < (channels >= 0).sum() <= len(channels) // 2


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_quantized(name: str) -> None:
    model, inputs = fused(name)
    want, before = output(model(**inputs)), copy.deepcopy(model)
    quantizer = pq_fx.prepare(model, SETTINGS)
    with quantizer.calibrate():
        model(**inputs)
    report = quantizer.convert()
    error = relative(output(model(**inputs)), want)
    assert {row.fqn for row in report.quantized if row.fqn.endswith(FUSED_NAMES)}
    rounding = relative(output(plainly_rounded(before, report)(**inputs)), want)
    assert 0 < error < MORE_THAN_ROUNDING * rounding
    # The separate projections are what calibration never saw.
    left = {row.fqn: row.skip_reason for row in report.skipped}
    apart = [n for n in left if n.endswith((".to_k", ".add_k_proj"))]
    assert apart and all("no call" in left[n] for n in apart)


@torch.no_grad()
@pytest.mark.parametrize("name", NOT_READ)
def test_where_fusing_does_nothing_the_separate_ones_are_quantized(name: str) -> None:
    model, inputs = fused(name)
    quantizer = pq_fx.prepare(model, SETTINGS)
    with quantizer.calibrate():
        model(**inputs)
    report = quantizer.convert()
    quantized = {row.fqn for row in report.quantized}
    assert {n for n in quantized if n.endswith(".to_k")}
    assert not [n for n in quantized if n.endswith(FUSED_NAMES)]
    for row in report.skipped:
        if row.fqn.endswith(FUSED_NAMES):
            assert row.skip_reason == "no call of the calibration reached it"


@torch.no_grad()
def test_diffusers_cannot_fuse_dual_attention() -> None:
    """SD3.5; when this fails, diffusers can, and the class belongs to FUSED as it is."""
    model, inputs = MODELS["sd3"].tiny()
    with pytest.raises(AttributeError, match="NoneType"):
        model.fuse_qkv_projections()
        model(**inputs)
