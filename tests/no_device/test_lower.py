"""The rewrites of lowering: what matches, what must not, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import pq_fx  # noqa: F401  (registers the ops)
from pq_fx.kernels import reference
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.passes._torch import make_fx
from pq_fx.passes.fuse_act import fuse_act
from pq_fx.passes.join_norms import join_norms
from pq_fx.passes.lower import lower, quantized_operations
from pq_fx.passes.merge_linears import merge_linears
from pq_fx.passes.rotate_pairs import rotate_pairs
from pq_fx.passes.share_quantize import share_quantize
from pq_fx.passes.verify import verify_graph

pq = torch.ops.pq
INT4 = "int4:16:bf16"
K = 48


def trace(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)


def quantized(
    h: Tensor, carrier: str = "codes", perm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    data, scale = pq.quantize(h, perm, None, None, INT4, 16, carrier)
    return data, scale


def weight(rows: int, seed: int, channels: int = K) -> tuple[Tensor, Tensor]:
    fmt = Format.parse(INT4)
    generator = torch.Generator().manual_seed(seed)
    q = reference.quantize(torch.randn(rows, channels, generator=generator), fmt)
    return pack(q.codes, fmt), q.scale


def linear(data: Tensor, scale: Tensor, w: Tensor, s: Tensor, bias: Tensor | None = None) -> Tensor:
    return pq.linear(data, scale, None, INT4, w, s, None, INT4, bias, torch.float32)


def same_numbers(gm: fx.GraphModule, function: Callable[..., Any], *args: Any) -> None:
    gm.recompile()
    for new, old in zip(gm(*args), function(*args), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def attention_and_mlp(attention: Tensor, mlp: Tensor, perm: Tensor) -> Any:
    return quantized(torch.cat([attention, F.gelu(mlp, approximate="tanh")], dim=2), perm=perm)


def parts() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 16), torch.randn(2, 5, 32), torch.randperm(K).int()


def test_concatenated_attention_and_activation_fuse_into_the_quantizer() -> None:
    args = parts()
    gm = trace(attention_and_mlp, *args)
    assert fuse_act(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    assert quantized_operations(gm) == {"act_quantize": 1}
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    same_numbers(gm, attention_and_mlp, *args)


def test_a_plain_concatenation_fuses_too() -> None:
    def function(a: Tensor, b: Tensor, perm: Tensor) -> Any:
        return quantized(torch.cat([a, b], dim=-1), perm=perm)

    args = parts()
    gm = trace(function, *args)
    assert fuse_act(gm.graph) == 1
    same_numbers(gm, function, *args)


def tokens(a: Tensor, b: Tensor, perm: Tensor) -> Any:
    return quantized(torch.cat([F.gelu(a), F.gelu(a)], dim=1))


def three(a: Tensor, b: Tensor, perm: Tensor) -> Any:
    return quantized(torch.cat([a, a, F.gelu(a)], dim=2))


def read_twice(a: Tensor, b: Tensor, perm: Tensor) -> Any:
    whole = torch.cat([a, F.gelu(b)], dim=2)
    return *quantized(whole), whole.sum()


@pytest.mark.parametrize("function", [tokens, three, read_twice])
def test_other_concatenations_stay(function: Callable[..., Any]) -> None:
    gm = trace(function, *parts())
    assert fuse_act(gm.graph) == 0


def test_an_activation_that_is_read_elsewhere_is_not_swallowed_but_the_concatenation_is() -> None:
    def function(a: Tensor, b: Tensor, perm: Tensor) -> Any:
        h = F.gelu(b)
        return *quantized(torch.cat([a, h], dim=2)), h.sum()

    args = parts()
    gm = trace(function, *args)
    assert fuse_act(gm.graph) == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=pq.act_quantize.default)
    assert node.args[2] == "none"
    same_numbers(gm, function, *args)


def qkv(carrier: str, biases: tuple[bool, bool, bool]) -> Callable[..., Any]:
    def function(h: Tensor, *packed: Tensor) -> Any:
        out = []
        for i, with_bias in enumerate(biases):
            w, s, b = packed[3 * i : 3 * i + 3]
            data, scale = quantized(h, carrier)
            out.append(linear(data, scale, w, s, b if with_bias else None))
        return tuple(out)

    return function


def qkv_args() -> list[Tensor]:
    torch.manual_seed(1)
    args = [torch.randn(2, 7, K)]
    for i, rows in enumerate((32, 16, 48)):
        args += [*weight(rows, i), torch.randn(rows)]
    return args


def test_linears_of_one_input_become_one() -> None:
    args, function = qkv_args(), qkv("e4m3", (True, True, True))
    gm = trace(function, *args)
    counts = lower(gm)
    assert (counts.shared, counts.merged) == (2, 3)
    assert quantized_operations(gm) == {"quantize": 1, "linears": 1}
    verify_graph(gm)
    same_numbers(gm, function, *args)


@pytest.mark.parametrize(
    ("carrier", "biases", "merged"),
    [
        ("codes", (True, True, True), 0),  # decoded inside the GEMM: nothing is gained
        ("e4m3", (True, False, True), 2),
        ("e4m3", (False, False, False), 3),
    ],
)
def test_what_joins(carrier: str, biases: tuple[bool, bool, bool], merged: int) -> None:
    args, function = qkv_args(), qkv(carrier, biases)
    gm = trace(function, *args)
    assert lower(gm).merged == merged
    same_numbers(gm, function, *args)


def test_linears_of_different_inputs_or_of_later_weights_stay_apart() -> None:
    def function(h: Tensor, w: Tensor, s: Tensor) -> Any:
        first, second = quantized(h, "e4m3"), quantized(h * 2, "e4m3")
        out = linear(*first, w, s)
        return out, linear(*second, w, s), linear(*first, w, s * out.abs().max().to(s.dtype))

    args = [qkv_args()[0], *weight(32, 0)]
    gm = trace(function, *args)
    assert share_quantize(gm.graph) == 0
    assert merge_linears(gm.graph) == 0
    same_numbers(gm, function, *args)


def joint(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Any:
    a, b = F.rms_norm(x, (16,), wx, 1e-6), F.rms_norm(y, (16,), wy, 1e-6)
    return (torch.cat([a, b], dim=1) * 2,)


def joint_args() -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    shapes = ((2, 3, 4, 16), (2, 7, 4, 16), (16,), (16,))
    return tuple(torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_norms_of_two_streams_join(mode: str) -> None:
    args = joint_args()
    gm = make_fx(joint, pre_dispatch=True, tracing_mode=mode)(*args)
    assert join_norms(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    verify_graph(gm)
    gm.recompile()
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default)
    want = joint(*(a.double() for a in args))[0]
    got, before = gm(*args)[0], joint(*args)[0]
    assert got.dtype == torch.bfloat16
    # No further from the exact result than the graph before: the order of an fp32 sum is all that differs.
    assert (got - want).abs().max() <= 1.01 * (before - want).abs().max()


def norms_read_twice(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Any:
    a, b = F.rms_norm(x, (16,), wx, 1e-6), F.rms_norm(y, (16,), wy, 1e-6)
    return torch.cat([a, b], dim=1), a.sum()


def different_epsilons(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Any:
    a, b = F.rms_norm(x, (16,), wx, 1e-6), F.rms_norm(y, (16,), wy, 1e-5)
    return (torch.cat([a, b], dim=1),)


def along_channels(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Any:
    a, b = F.rms_norm(x, (16,), wx, 1e-6), F.rms_norm(x, (16,), wy, 1e-6)
    return (torch.cat([a, b], dim=-1),)


def one_is_no_norm(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Any:
    return (torch.cat([F.rms_norm(x, (16,), wx, 1e-6), y * wy], dim=1),)


@pytest.mark.parametrize(
    "function", [norms_read_twice, different_epsilons, along_channels, one_is_no_norm]
)
def test_other_norms_stay(function: Callable[..., Any]) -> None:
    gm = trace(function, *joint_args())
    assert join_norms(gm.graph) == 0


def turn(x: Tensor) -> Any:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (torch.stack([-b, a], dim=-1).flatten(3),)


def test_the_turn_of_rotary_embeddings_is_one_read() -> None:
    x = torch.randn(2, 5, 3, 16, dtype=torch.bfloat16)
    x[0, 0, 0, :2] = torch.tensor([0.0, float("inf")])
    gm = trace(turn, x)
    assert rotate_pairs(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    verify_graph(gm)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.stack.default)
    gm.recompile()
    assert torch.equal(gm(x)[0].view(torch.int16), turn(x)[0].view(torch.int16))


def other_half(x: Tensor) -> Any:
    a, b = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return (torch.stack([-b, a], dim=-2),)


def other_sign(x: Tensor) -> Any:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (torch.stack([-a, b], dim=-1),)


def two_tensors(x: Tensor) -> Any:
    a, _ = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    _, b = (x * 2).reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (torch.stack([-b, a], dim=-1),)


@pytest.mark.parametrize("function", [other_half, other_sign, two_tensors])
def test_other_stacks_stay(function: Callable[..., Any]) -> None:
    assert rotate_pairs(trace(function, torch.randn(2, 5, 3, 16)).graph) == 0
