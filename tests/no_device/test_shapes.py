"""New shapes cost a quantized model at most one compile more than the float model, and every result is right.

Dynamo's graphs are counted here, with everything that the backend does to them but Inductor's code generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODELS
from torch import nn

import pq_fx
from pq_fx.passes import _torch

# (rows, columns, batch, text tokens, timestep): 3 resolutions, 2 batch sizes, 2 text lengths, other timesteps
SEQUENCE = (
    (4, 4, 2, 6, 0.3), (4, 4, 2, 6, 0.9), (4, 6, 2, 6, 0.3), (6, 6, 2, 6, 0.5), (6, 6, 2, 9, 0.5), (6, 6, 3, 9, 0.1),
    (4, 4, 3, 9, 0.2),
)  # fmt: skip
SETTINGS = {"format": "int4", "group_size": 16, "weight_only_format": "int4:16:bf16"}


def flux(rows: int, columns: int, batch: int, text: int, time: float) -> dict[str, Any]:
    ids = torch.zeros(rows * columns, 3)
    ids[:, 1] = torch.arange(rows).repeat_interleave(columns)
    ids[:, 2] = torch.arange(columns).repeat(rows)
    return dict(
        hidden_states=torch.randn(batch, rows * columns, 12),
        encoder_hidden_states=torch.randn(batch, text, 20),
        pooled_projections=torch.randn(batch, 24),
        timestep=torch.full((batch,), time),
        guidance=torch.full((batch,), 3.5),
        img_ids=ids,
        txt_ids=torch.zeros(text, 3),
    )


def wan(rows: int, columns: int, batch: int, text: int, time: float) -> dict[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 4, 1, 2 * rows, 2 * columns),
        encoder_hidden_states=torch.randn(batch, text, 16),
        timestep=torch.full((batch,), 1000 * time),
    )


# class, configuration, inputs, compiled block by block
CASES: dict[str, tuple[str, dict, Callable[..., dict], bool]] = {
    "flux": ("flux", {"num_layers": 1, "num_single_layers": 1}, flux, False),
    "flux-12-blocks": ("flux", {"num_layers": 4, "num_single_layers": 8}, flux, True),
    "wan": ("wan", {"num_layers": 1}, wan, False),
}


def float_graphs(model: nn.Module, calls: list[dict], regional: bool) -> int:
    """How many graphs the float model has over these calls."""
    graphs = 0

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable:
        nonlocal graphs
        graphs += 1
        return gm.forward

    torch._dynamo.reset()
    run = compiled(model, backend, regional)
    for call in calls:
        run(**call)
    return graphs


def compiled(model: nn.Module, backend: Any, regional: bool) -> Callable:
    if not regional:
        return torch.compile(model, backend=backend, fullgraph=True)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_new_shapes(name: str, no_codegen: list[int]) -> None:
    kind, changes, make, regional = CASES[name]
    case = MODELS[kind]

    def build(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return case.build(case.tiny_config | changes)

    calls = [make(*shape) for shape in SEQUENCE]
    with _torch.every_graph():
        wanted = float_graphs(build(), calls, regional)
    torch._dynamo.reset()
    model = build()
    quantizer = pq_fx.prepare(model, SETTINGS)
    with quantizer.calibrate():
        model(**calls[0])
    quantizer.convert()
    eager = [model(**call)[0] for call in calls]
    torch._dynamo.reset()
    no_codegen[0] = 0
    run = compiled(model, "permuquant", regional)
    with _torch.every_graph():  # beyond 8 graphs of one block's code Dynamo gives up
        for call, want in zip(calls, eager, strict=True):
            got = run(**call)[0]
            assert ((got - want).norm() / want.norm()).item() < 1e-5
    assert 0 < no_codegen[0] <= wanted + 1
    if regional:
        check_second_instance(model, build(seed=1), calls[0], eager[0])


def check_second_instance(
    model: nn.Module, other: nn.Module, call: dict, want: torch.Tensor
) -> None:
    """Another model of the class has other weights in the same code: each gets its own."""
    quantizer = pq_fx.prepare(other, SETTINGS)
    with quantizer.calibrate():
        other(**call)
    quantizer.convert()
    own = other(**call)[0]
    assert not torch.allclose(want, own, rtol=0.1)
    torch._dynamo.reset()
    first, second = compiled(model, "permuquant", True), compiled(other, "permuquant", True)
    assert torch.allclose(first(**call)[0], want, atol=1e-4)
    assert torch.allclose(second(**call)[0], own, atol=1e-4)
