"""A plain module, arguments that models share, and stand-ins for what real classes compute on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

randn = torch.randn
Inputs = dict[str, Any]


def long(*values: int) -> torch.Tensor:
    """An int64 tensor of these values."""
    return torch.tensor(values)


def real(*values: float) -> torch.Tensor:
    """An fp32 tensor of these values."""
    return torch.tensor(values)


def image_text(channels: int, side: int, text: tuple[int, int], time: torch.Tensor) -> Inputs:
    """The arguments that image models share: latents, text states and a time step each."""
    return dict(
        hidden_states=randn(2, channels, side, side),
        encoder_hidden_states=randn(2, *text),
        timestep=time,
    )


class MLP(nn.Module):
    """A plain module, to show that nothing is specific to transformers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(width // 4, width),
            nn.Linear(width, width),
            nn.Linear(width, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width / 4] -> [..., 4]."""
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def static_hidream(model: nn.Module) -> None:
    """HiDream counts each expert's tokens and reads the picture's size on the host.

    Here each expert gets its mean share, which has the same FLOPs, and the size is that of the (square) latents.
    """
    p = model.config.patch_size

    def patchify(x: torch.Tensor) -> tuple[torch.Tensor, None, list[tuple[int, int]], torch.Tensor]:
        batch, _, height, width = x.shape
        h, w = height // p, width // p
        patches = x.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 3, 5, 1)
        ids = torch.zeros(batch, h * w, 3, device=x.device)
        return patches.flatten(1, 2).flatten(2), None, [(h, w)] * batch, ids

    def share(layer: nn.Module) -> Callable[..., torch.Tensor]:
        def moe_infer(x: torch.Tensor, _: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            active = layer.num_activated_experts
            rows = x.repeat(active, 1).chunk(len(layer.experts))
            parts = [expert(part) for expert, part in zip(layer.experts, rows, strict=True)]
            return (torch.cat(parts) * weights).unflatten(0, (active, -1)).sum(0)

        return moe_infer

    model.patchify = patchify
    for layer in model.modules():
        if hasattr(layer, "moe_infer"):
            layer.moe_infer = share(layer)


class FullMask:
    """Stands for a mask without padding, whose row sums are known."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def sum(self, dim: int) -> FullMask:
        """Row sums, which `tolist` gives."""
        return self

    def tolist(self) -> list[int]:
        """The length of every caption."""
        return [self.shape[1]] * self.shape[0]


def full_captions(model: nn.Module) -> None:
    """Lumina2 reads the caption lengths on the host; here no caption is padded."""
    forward = model.rope_embedder.forward
    model.rope_embedder.forward = lambda x, mask: forward(x, FullMask(tuple(mask.shape)))
