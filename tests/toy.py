"""A transformer of a few blocks that calibrates and converts in a second: the robustness tests' subject."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pq_fx
from pq_fx.passes.lower import lower
from pq_fx.passes.retrace import retrace

WIDTH, HEADS = 64, 4
SAME = 1e-5  # compiled against eager in fp32: sums in another order
CONFIG = pq_fx.QuantConfig("int4", group_size=16, method="permuquant", calibration_rows=64)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm; channels of unlike size, so that sorting pays."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Toy(nn.Module):
    """`blocks` blocks between two projections that stay in float."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.inside = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.outside = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for block in self.blocks:
            x = block(x)
        return self.outside(x)


def toy(seed: int = 0, blocks: int = 2, dtype: torch.dtype = torch.float32) -> Toy:
    """A float model in eval mode; equal seeds give equal weights."""
    generator = torch.Generator().manual_seed(seed)
    model = Toy(blocks)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p.copy_(torch.randn(p.shape, generator=generator).mul(0.5).exp())
        for block in model.blocks:  # what `v` and `up` write is unlike by channel: worth a fold
            for writer in (block.v, block.up):
                unlike = torch.randn(writer.out_features, generator=generator).exp()
                writer.weight.mul_(unlike[:, None])
    return model.to(dtype).eval()


def rows(
    seed: int = 0, batch: int = 2, tokens: int = 7, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inputs [batch, tokens, 8]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, tokens, 8, generator=generator).to(dtype)


def calibrated(
    model: nn.Module, config: pq_fx.QuantConfig = CONFIG, calls: int = 2
) -> pq_fx.Quantizer:
    """A quantizer that has seen `calls` calls of `model`."""
    quantizer = pq_fx.prepare(model, config)
    dtype = next(p.dtype for p in model.parameters())
    with torch.no_grad(), quantizer.calibrate():
        for i in range(calls):
            model(rows(i, dtype=dtype))
    return quantizer


def quantized(model: nn.Module, config: pq_fx.QuantConfig = CONFIG) -> nn.Module:
    """`model`, calibrated and converted in place."""
    calibrated(model, config).convert()
    return model


def lowering_backend(gm: torch.fx.GraphModule, _: object) -> object:
    """Every pass of the backend, and no Inductor. One object, so that Dynamo shares its graphs."""
    compiled.append(gm)
    traced = retrace(gm)
    lower(traced)
    return traced.forward


compiled: list[torch.fx.GraphModule] = []  # the graphs that `lowering_backend` was given


def lowered(model: nn.Module, **settings: bool) -> nn.Module:
    """`model` compiled by `lowering_backend`."""
    return torch.compile(model, backend=lowering_backend, fullgraph=True, **settings)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got - want).norm() / want.norm()).item()


@torch.no_grad()
def out(model: nn.Module, seed: int = 5, **shape: int) -> Tensor:
    """The model's output for `rows(seed, **shape)`, without gradient."""
    return model(rows(seed, **shape))


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the state dict as bytes."""
    return {
        n: v.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if v.dim()
        else v.item().hex().encode()
        for n, v in model.state_dict().items()
    }
