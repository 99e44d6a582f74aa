"""The passes on a torch.export program: quantized, saved, loaded and run without the backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pq_fx.errors import GraphError
from pq_fx.kernels.formats import get_format
from pq_fx.kernels.reference import fake_quantize
from pq_fx.passes import Settings
from pq_fx.passes.exported import quantize_exported


class Block(nn.Module):
    """A pre-norm MLP block between an embedder and a final projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 64)
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.out = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h + self.down(nn.functional.gelu(self.up(self.norm(h))))
        return self.out(nn.functional.layer_norm(h, (64,)))


def exported(tokens: int = 7) -> tuple[Block, torch.export.ExportedProgram, dict]:
    torch.manual_seed(3)
    model = Block().eval().requires_grad_(False)
    with torch.no_grad():
        model.up.weight[:, ::8] *= 6  # unlike channels, so that an order pays
        model.norm.weight[::5] *= 5
        model.down.weight[:, 3::7] *= 5
    shapes = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    program = torch.export.export(
        model, (torch.randn(2, tokens, 16),), dynamic_shapes=shapes, strict=False
    )
    return model, program, shapes


@pytest.mark.parametrize("fmt", ["int4:16:bf16", "int3f:32:bf16", "nvfp4:16:e4m3", "mxfp4:32:e8m0"])
def test_quantize_save_load_run(fmt: str, tmp_path: Path) -> None:
    model, program, shapes = exported()
    torch.manual_seed(4)
    data = [(torch.randn(2, 7, 16),) for _ in range(4)]
    format_ = get_format(*fmt.split(":")[:1], group_size=int(fmt.split(":")[1]))
    settings = Settings(weight=format_, activation=format_, rotate=False)
    before = {k: v.clone() for k, v in program.state_dict.items()}
    quantized = quantize_exported(program, data, settings, dynamic_shapes=(shapes["x"],))
    assert all(torch.equal(v, before[k]) for k, v in program.state_dict.items())
    targets = [str(n.target) for n in quantized.graph.nodes if n.op == "call_function"]
    assert targets.count("pq.norm_quantize.default") == 1
    assert targets.count("pq.act_quantize.default") == 1
    assert targets.count("pq.linear.default") == 2
    assert targets.count("aten.linear.default") == 2  # embedder and final projection
    assert "up.weight" not in quantized.state_dict and "down.weight" not in quantized.state_dict

    torch.export.save(quantized, tmp_path / "q.pt2")
    loaded = torch.export.load(tmp_path / "q.pt2").module()
    x = torch.randn(2, 11, 16)  # another number of tokens
    with torch.no_grad():
        want, got = model(x), loaded(x)
        assert torch.equal(got, quantized.module()(x))
        # Independent: plain fake quantization of both linears, in the model's own order.
        h = model.embed(x)
        inner = nn.functional.linear(
            fake_quantize(model.norm(h), format_),
            fake_quantize(model.up.weight, format_),
            model.up.bias,
        )
        inner = nn.functional.linear(
            fake_quantize(nn.functional.gelu(inner), format_),
            fake_quantize(model.down.weight, format_),
        )
        plain = model.out(nn.functional.layer_norm(h + inner, (64,)))
    error = ((got - want).norm() / want.norm()).item()
    naive = ((plain - want).norm() / want.norm()).item()
    assert 0 < error < 1.1 * naive  # an order was only taken where it pays


def test_a_program_without_linears_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) + 1

    program = torch.export.export(Plain(), (torch.randn(2, 3),), strict=False)
    settings = Settings(weight=get_format("int4"), activation=get_format("int4"))
    with pytest.raises(GraphError, match="no linear"):
        quantize_exported(program, [(torch.randn(2, 3),)], settings)
