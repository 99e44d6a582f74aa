"""A small quantized model to save, and ways to change what was saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pq_fx import checkpoint_config, storage
from pq_fx.checkpoint import load
from pq_fx.config import QuantConfig
from pq_fx.errors import CheckpointError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import permute_rotate, quantize
from pq_fx.modules import ActivationQuantizer, QuantLinear
from pq_fx.report import LayerReport, Report

WIDTH, INNER = 64, 192
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Toy(nn.Module):
    """q and k share an input quantizer; `first` stays in float; `head` has weights only."""

    def __init__(self, inner: int = INNER, tied: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(24, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, inner)
        self.k = nn.Linear(WIDTH, inner, bias=False)
        self.down = nn.Linear(inner, WIDTH)
        self.head = nn.Linear(WIDTH, 40)
        self.again = self.first if tied else nn.Linear(24, WIDTH)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        y = self.norm(self.first(x) + self.again(x))
        return self.head(y + self.down(self.q(y) * self.k(y)))


def quantized_linear(linear, weight_format, quantizer=None):
    fmt = Format.parse(weight_format)
    weight = linear.weight.detach().float()
    if quantizer is not None:
        weight = permute_rotate(weight, quantizer.perm, quantizer.rotation)
    whole = weight.abs().amax() / (448 * 6) if fmt.two_level else None
    q = quantize(weight, fmt, global_scale=whole)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return QuantLinear(
        linear.in_features,
        linear.out_features,
        fmt.key,
        pack(q.codes, fmt),
        q.scale.contiguous(),
        q.global_scale,
        bias,
        quantizer,
    )


def quantized_toy(weight="int4:64:bf16", activation="int4:64:bf16", seed=0):
    torch.manual_seed(seed)
    model = Toy().eval().requires_grad_(False)
    whole = torch.tensor(0.02) if Format.parse(activation).two_level else None
    perm = torch.randperm(WIDTH).int()
    shared = ActivationQuantizer(WIDTH, activation, 16, perm, whole)
    model.q = quantized_linear(model.q, weight, shared)
    model.k = quantized_linear(model.k, weight, shared)
    alone = ActivationQuantizer(INNER, activation, 0, None, whole)
    model.down = quantized_linear(model.down, weight, alone)
    model.head = quantized_linear(model.head, "int4:32:pow2")
    return model.eval()


def report() -> Report:
    return Report((LayerReport("q", WIDTH, INNER),), QuantConfig("int4"), weight_bytes=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refused(folder: Path, says: str, model: nn.Module | None = None) -> None:
    model = Toy() if model is None else model
    before = copy.deepcopy(model.state_dict())
    modules = [(name, id(module)) for name, module in model.named_modules()]
    training = model.training
    with pytest.raises(CheckpointError, match=says):
        load(folder, model)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert model.training == training
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def edit_config(folder: Path, change) -> None:
    """Change the settings and their checksum with them: what is left are the checks of content."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    config["quantization_config"]["sha256"] = checkpoint_config.checksum(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    """Change tensors in the file and the recorded checksums with them."""
    from safetensors.torch import load_file, save_file

    file = folder / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    recorded = {"bytes": file.stat().st_size, "sha256": storage.sha256(file)}
    edit_config(folder, lambda config: config["weights"].update({WEIGHTS: recorded}))
