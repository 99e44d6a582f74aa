"""Small real models for the tests without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import quantized_toy, report
from diffusers import FluxTransformer2DModel
from torch import nn

from pq_fx.checkpoint import save
from pq_fx.passes import _torch


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Compiled code of one test must not serve another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_codegen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`[count]` of the graphs that reached Inductor, which is left out: lowered graphs run as they are.

    For tests of what Dynamo and the backend do. Most of the time of a compiled test is g++'s.
    """
    graphs = [0]

    def compile_fx(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable:
        graphs[0] += 1
        return gm.forward

    monkeypatch.setattr(_torch, "compile_fx", compile_fx)
    return graphs


@pytest.fixture
def tiny_flux() -> Callable[..., tuple[nn.Module, dict]]:
    """`tiny_flux(dtype, heads=3, head_dim=16, layers=2, singles=2, side=(3, 5), batch=2)` -> (model, inputs)."""

    def make(
        dtype: torch.dtype = torch.float32,
        *,
        heads: int = 3,
        head_dim: int = 16,
        layers: int = 2,
        singles: int = 2,
        side: tuple[int, int] = (3, 5),
        batch: int = 2,
        seed: int = 0,
    ) -> tuple[nn.Module, dict]:
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            in_channels=12,
            num_layers=layers,
            num_single_layers=singles,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=20,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
        )
        return model.to(dtype).eval(), flux_inputs(dtype, side, batch)

    return make


def flux_inputs(dtype: torch.dtype, side: tuple[int, int], batch: int) -> dict:
    height, width = side
    axes = torch.arange(1), torch.arange(height), torch.arange(width)
    ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    inputs = {
        "hidden_states": torch.randn(batch, height * width, 12),
        "encoder_hidden_states": torch.randn(batch, 7, 20),
        "pooled_projections": torch.randn(batch, 24),
        "timestep": torch.rand(batch),
        "guidance": torch.rand(batch),
        "img_ids": ids.float(),
        "txt_ids": torch.zeros(7, 3),
    }
    return {k: v.to(dtype) for k, v in inputs.items()}


@pytest.fixture
def make_flux_inputs() -> Callable[[torch.dtype, tuple[int, int], int], dict]:
    """`make_flux_inputs(dtype, (height, width), batch)` for a second resolution."""
    return flux_inputs


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    """The small quantized model of checkpoints.py, and the folder where it is saved with a report."""
    model = quantized_toy()
    save(model, tmp_path / "m", report())
    return model, tmp_path / "m"
