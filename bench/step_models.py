"""The transformers that flux_step.py times: published configurations, random weights, one step's inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class StepModel:
    """A class with its published settings; `inputs(side, batch)` in pixels; where `--layers` goes."""

    cls: type[nn.Module]
    config: dict[str, Any]
    inputs: Callable[[int, int], Inputs]
    depth: tuple[str, ...]
    tiny: dict[str, Any]


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def flux_inputs(side: int, batch: int) -> Inputs:
    """4096 image tokens at 1024 pixels, 512 text tokens."""
    n = side // 16
    ids = torch.zeros(n, n, 3)
    ids[..., 1], ids[..., 2] = torch.arange(n)[:, None], torch.arange(n)[None, :]
    return {
        "hidden_states": _randn(batch, n * n, 64),
        "encoder_hidden_states": _randn(batch, 512, 4096),
        "pooled_projections": _randn(batch, 768),
        "timestep": torch.full((batch,), 0.6, dtype=torch.bfloat16),
        "guidance": torch.full((batch,), 3.5, dtype=torch.bfloat16),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(512, 3),
        "return_dict": False,
    }


def sana_inputs(side: int, batch: int) -> Inputs:
    """A 32 x 32 latent at 1024 pixels (the autoencoder divides by 32), 300 text tokens."""
    return {
        "hidden_states": _randn(batch, 32, side // 32, side // 32),
        "encoder_hidden_states": _randn(batch, 300, 2304),
        "timestep": torch.full((batch,), 600.0, dtype=torch.bfloat16),
        "return_dict": False,
    }


def zimage_inputs(side: int, batch: int) -> Inputs:
    """A 128 x 128 latent at 1024 pixels, 128 text tokens; this class takes lists."""
    return {
        "x": [_randn(16, 1, side // 8, side // 8) for _ in range(batch)],
        "t": torch.full((batch,), 0.4, dtype=torch.bfloat16),
        "cap_feats": [_randn(128, 2560) for _ in range(batch)],
        "return_dict": False,
    }


MODELS = {
    "flux.1-dev": StepModel(
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        flux_inputs,
        ("num_layers", "num_single_layers"),
        {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": (16, 24, 24)},
    ),
    "sana-1.5-1.6b": StepModel(
        diffusers.SanaTransformer2DModel,
        {"qk_norm": "rms_norm_across_heads", "guidance_embeds": False},
        sana_inputs,
        ("num_layers",),
        {"num_attention_heads": 4, "num_cross_attention_heads": 2, "cross_attention_dim": 128},
    ),
    "z-image-turbo": StepModel(
        diffusers.ZImageTransformer2DModel,
        {},
        zimage_inputs,
        ("n_layers", "n_refiner_layers"),
        {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24]},
    ),
}


def build(
    which: str, layers: list[int] | None, tiny: bool, device: str, seed: int = 0
) -> nn.Module:
    """The model in bf16, with channels of very different size as trained models have them."""
    spec = MODELS[which]
    config = dict(spec.config) | (spec.tiny if tiny else {})
    if layers:
        config |= dict(zip(spec.depth, layers, strict=False))
    with torch.device("meta"):
        model = spec.cls(**config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    if device == "meta":
        return model
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        p.normal_(0.0, 0.7 / p[0].numel() ** 0.5, generator=generator)
        outliers = torch.randint(
            p.shape[1], (max(1, p.shape[1] // 100),), device=device, generator=generator
        )
        p[:, outliers] *= 4.0
    for name, b in model.named_buffers():
        raise AssertionError(f"buffer {name} {tuple(b.shape)} is not initialized")
    return model


def step_inputs(which: str, side: int, batch: int, device: str) -> Inputs:
    """Random inputs of one step on `device`, the same for every variant."""
    torch.manual_seed(1)
    made = MODELS[which].inputs(side, batch)
    return {
        k: [t.to(device) for t in v]
        if isinstance(v, list)
        else (v.to(device) if isinstance(v, torch.Tensor) else v)
        for k, v in made.items()
    }


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a regional compile compiles: every member of the model's module lists of blocks."""
    lists = [m for name, m in model.named_children() if isinstance(m, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(True for _ in block.parameters())]
