"""A model of five linears and some calls of it, for tests of calibration in one and in several processes."""

from __future__ import annotations

import torch
from torch import nn

import pq_fx

CONFIG = {"format": "int4", "group_size": 16, "calibration_rows": 24}


class Block(nn.Module):
    """An embedder, a gated MLP with a residual around it, a final projection."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 48)
        self.gate = nn.Linear(width, 48)
        self.down = nn.Linear(48, width)
        self.out = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        n = self.norm(h)
        h = h + self.down(nn.functional.silu(self.gate(n)) * self.up(n))
        return self.out(nn.functional.layer_norm(h, h.shape[-1:]))


def block(seed: int = 0, width: int = 32) -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(seed)
    model = Block(width).eval().requires_grad_(False)
    model.up.weight[::5] *= 16  # channels of unlike size, which sorting pays for
    model.down.weight[:, ::5] /= 16
    return model


def calls(count: int, seed: int = 1, first: int = 0) -> list[torch.Tensor]:
    """Inputs [2, 13, 8] of calls `first`, `first` + 1, ..."""
    return [
        torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(1000 * seed + i))
        for i in range(first, first + count)
    ]


def gathered(model: nn.Module, inputs: list[torch.Tensor], **changes: object) -> pq_fx.Quantizer:
    """A quantizer that has seen these inputs."""
    quantizer = pq_fx.prepare(model, CONFIG | changes)
    with torch.no_grad(), quantizer.calibrate(progress=False):
        for x in inputs:
            model(x)
    return quantizer
