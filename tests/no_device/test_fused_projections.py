"""`fuse_qkv_projections()` before quantizing: one linear makes queries, keys and values, in pieces of its rows."""

from __future__ import annotations

import copy

import pytest
import torch
from check_models import MORE_THAN_ROUNDING, SETTINGS, output, plainly_rounded, relative
from models import MODELS

import pq_fx

# class: what differs from the tiny configuration; diffusers' own fusing fails on SD3.5's dual attention
FUSED = {"flux": {}, "sd3": {"dual_attention_layers": ()}, "pixart": {}}


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_go_the_whole_road(name: str) -> None:
    case = MODELS[name]
    torch.manual_seed(0)
    model, inputs = case.build(case.tiny_config | FUSED[name]), case.tiny_inputs()
    for p in model.parameters():
        if not p.any():
            p.normal_(0, 0.1)
    model.fuse_qkv_projections()
    want, before = output(model(**inputs)), copy.deepcopy(model)
    quantizer = pq_fx.prepare(model, SETTINGS)
    with quantizer.calibrate():
        model(**inputs)
    report = quantizer.convert()
    error = relative(output(model(**inputs)), want)
    fused = {row.fqn for row in report.quantized if row.fqn.endswith(("to_qkv", "to_kv"))}
    assert fused
    assert (
        0
        < error
        < MORE_THAN_ROUNDING * relative(output(plainly_rounded(before, report)(**inputs)), want)
    )
    # The separate projections are what calibration never saw.
    left = {row.fqn: row.skip_reason for row in report.skipped}
    apart = [n for n in left if n.endswith("attn.to_q") or n.endswith("attn1.to_q")]
    assert apart and all("no call" in left[n] for n in apart)
