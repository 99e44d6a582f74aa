"""A FLUX of two blocks that calibrates and converts in a second, for damage and faults."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import pq_fx

SETTINGS = {
    "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
# Symmetric integers, and in the single block scales with a sign.
CONFIG = pq_fx.QuantConfig(
    "int4",
    group_size=16,
    method="permuquant",
    calibration_rows=32,
    rules={r"re:single_.*": "int4f:16:bf16"},
)


def float_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**SETTINGS).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(
            torch.randn_like(p)
            * (1 + torch.arange(p.shape[0]) % 3).view(-1, *[1] * (p.dim() - 1))
            * 0.2
        )
    return model


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    random_ = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return {
        "hidden_states": random_(1, 6, 8), "encoder_hidden_states": random_(1, 3, 16),
        "pooled_projections": random_(1, 16), "timestep": torch.rand(1, generator=generator),
        "img_ids": torch.arange(18).view(6, 3).float(), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip


def calibrated(
    model: nn.Module, config: pq_fx.QuantConfig = CONFIG, calls: int = 2
) -> pq_fx.Quantizer:
    quantizer = pq_fx.prepare(model, config)
    with torch.no_grad(), quantizer.calibrate(progress=False):
        for i in range(calls):
            model(**{n: v.to(model.device) for n, v in inputs(i).items()})
    return quantizer


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Every tensor's bytes, every module's type, and what the model computes, if it can."""
    state = {
        n: (v.dtype, v.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        for n, v in model.state_dict().items()
    }
    with torch.no_grad():
        numbers = model(**inputs(7))[0].numpy().tobytes()
    return {
        "state": state,
        "modules": [(n, type(m)) for n, m in model.named_modules()],
        "out": numbers,
    }
