"""QuantLinear and ActivationQuantizer as modules: casts, moves, copies, and the quantizer that linears share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pq_fx.dequantize import dequantize, float_weight
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import nvfp4_global_scale, permute_rotate, quantize
from pq_fx.modules import ActivationQuantizer, QuantLinear

WIDTH = 64


class Pair(nn.Module):
    """Two linears that read one tensor, so they share its quantizer."""

    def __init__(self, key: str) -> None:
        super().__init__()
        fmt = Format.parse(key)
        scale = torch.tensor(0.01) if fmt.two_level else None
        perm = torch.randperm(WIDTH).int()
        shared = ActivationQuantizer(WIDTH, key, 16, perm, scale, torch.tensor(0.9))
        self.norm = nn.LayerNorm(WIDTH)
        self.weights = [torch.randn(out, WIDTH) for out in (48, 80)]
        self.q, self.k = (_linear(fmt, shared, weight) for weight in self.weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.q(y), self.k(y)


def _linear(fmt: Format, shared: ActivationQuantizer, weight: Tensor) -> QuantLinear:
    out = len(weight)
    weight = permute_rotate(weight, shared.perm, shared.rotation)
    whole = nvfp4_global_scale(weight.abs().amax()) if fmt.two_level else None
    q = quantize(weight, fmt, global_scale=whole)
    return QuantLinear(
        WIDTH, out, fmt.key, pack(q.codes, fmt), q.scale, q.global_scale, torch.randn(out), shared
    )


@pytest.fixture(params=["int4:64:bf16", "nvfp4:16:e4m3", "mxfp4:32:e8m0"])
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(3)
    return Pair(request.param).eval().requires_grad_(False)


def test_a_cast_changes_the_float_parts_only(pair: Pair) -> None:
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    pair.to(torch.float16)
    cast = {n for n, v in pair.state_dict().items() if v.dtype != before[n].dtype}
    assert cast == {"norm.weight", "norm.bias", "q.bias", "k.bias"}
    for name, value in pair.state_dict().items():
        assert torch.equal(value.float(), before[name].to(value.dtype).float())
    for y in pair(torch.randn(3, WIDTH, dtype=torch.float16)):
        assert y.dtype == torch.float16 and y.isfinite().all()
    pair.double()
    assert pair.q.bias.dtype == torch.float64
    assert pair.q.weight_scale.dtype == before["q.weight_scale"].dtype


def test_the_shared_quantizer_stays_one_object(pair: Pair) -> None:
    x = torch.randn(3, WIDTH)
    want = pair(x)
    for other in (pair, copy.deepcopy(pair), pair.to(torch.float32), pair.to("cpu").eval()):
        assert other.q.input_quantizer is other.k.input_quantizer
        assert all(torch.equal(g, w) for g, w in zip(other(x), want, strict=True))
    empty = copy.deepcopy(pair).to("meta")
    assert empty.q.input_quantizer.perm.is_meta and empty.q.weight_scale.is_meta
    assert empty.q.input_quantizer is empty.k.input_quantizer
    twin = copy.deepcopy(pair)
    for tensor in twin.parameters():
        tensor.zero_()
    twin.load_state_dict(pair.state_dict(), strict=True)
    assert all(torch.equal(g, w) for g, w in zip(twin(x), want, strict=True))


def test_offload_hooks_find_every_tensor(pair: Pair) -> None:
    assert not list(pair.buffers())  # accelerate leaves buffers where they are
    first = next(p for p in pair.q.parameters() if p.is_floating_point())
    assert first is pair.q.bias  # what diffusers and transformers call the model's dtype


def test_dequantized_weights_are_the_float_ones_but_for_rounding(pair: Pair) -> None:
    x = torch.randn(3, WIDTH)
    y = pair.norm(x)
    for linear, weight in zip((pair.q, pair.k), pair.weights, strict=True):
        got = float_weight(linear)
        assert 0.01 < (got - weight).norm() / weight.norm() < 0.2
        assert (got.flip(1) - weight).norm() / weight.norm() > 1
    bias = pair.k.bias.clone()
    want = y @ float_weight(pair.k).T + bias
    dequantize(pair)
    assert type(pair.k) is nn.Linear and not pair.k.weight.requires_grad
    assert (pair.k(y) - want).norm() / want.norm() < 1e-6
    assert dequantize(Pair("int4:64:bf16"), torch.bfloat16).q.weight.dtype == torch.bfloat16
