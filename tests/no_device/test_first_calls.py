"""The one-line form on models whose first call is unlike the others, and models that come in pieces."""

from __future__ import annotations

import logging

import pytest
import torch
from models import MODELS
from torch import nn

import pq_fx
from pq_fx.modules import quantized_linears
from pq_fx.pointwise import linearize

SETTINGS = {
    "format": "int4", "group_size": 16, "weight_only_format": "int4:16:bf16", "calibration_rows": 64,
}  # fmt: skip


def first_calls(name: str, calls: int, steps: int) -> tuple[nn.Module, torch.Tensor]:
    """A tiny model after `calls` calls of the one-line form, and the last result."""
    torch.compiler.reset()
    model, inputs = MODELS[name].tiny()
    options = {**SETTINGS, "calibration_steps": steps}
    run = torch.compile(model, backend="permuquant", options=options)
    reference = MODELS[name].tiny()[0]
    with torch.no_grad():
        for call in range(calls):
            want = torch.stack(list(reference(**inputs)[0]))
            got = run(**inputs)[0]
            if call < steps + 1:  # the one that follows may be converted on its way
                assert torch.equal(torch.stack(list(got)), want)
            linearize(reference)  # as the first call leaves the model's pointwise convolutions
    assert (torch.stack(list(got)) - want).norm() < 0.3 * want.norm()
    return model, got


def same_way(name: str) -> nn.Module:
    """The model quantized by prepare, calibrate, convert with the same calls."""
    torch.compiler.reset()
    model, inputs = MODELS[name].tiny()
    quantizer = pq_fx.prepare(model, SETTINGS)
    with torch.no_grad(), quantizer.calibrate():
        model(**inputs)
    quantizer.convert()
    return model


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("zimage", "a cold table of rotations breaks the first call"),
        ("sana", "pointwise convolutions are linears after it"),
    ],
)
def test_a_first_call_that_is_not_counted(
    name: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pq_fx"):
        model, _ = first_calls(name, calls=1, steps=1)
        assert not quantized_linears(model) and "not counted" in caplog.text
        model, _ = first_calls(name, calls=2, steps=1)
    assert quantized_linears(model).keys() == quantized_linears(same_way(name)).keys(), why
    assert not any(type(m) is nn.Conv2d and m.weight.is_meta for m in model.modules())


@pytest.mark.usefixtures("no_codegen")
def test_pieces_are_converted_when_all_were_seen() -> None:
    model, _ = first_calls(
        "lumina", calls=3, steps=1
    )  # one to warm up, one that counts, one that converts
    assert quantized_linears(model).keys() == quantized_linears(same_way("lumina")).keys()


@pytest.mark.parametrize(
    ("name", "embedders", "inner"),
    [
        (
            "lumina",
            {"x_embedder", "norm_out.linear_2", "time_caption_embed.timestep_embedder.linear_1"},
            {"layers.0.attn.to_q", "layers.1.feed_forward.linear_2", "noise_refiner.0.attn.to_k"},
        ),
        (
            "hidream",
            {"x_embedder.proj", "final_layer.linear"},
            {
                "double_stream_blocks.0.block.ff_i.shared_experts.w2",
                "double_stream_blocks.0.block.attn1.to_q",
            },
        ),
    ],
)
def test_linears_beside_a_break_are_no_embedders(
    name: str, embedders: set[str], inner: set[str]
) -> None:
    report = same_way(name).quantization_report
    left = {row.fqn: row.skip_reason for row in report.skipped}
    assert not inner & left.keys()
    assert embedders <= left.keys()
