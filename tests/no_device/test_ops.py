"""The ops: schemas and fakes, agreement with float formulas, compiled = eager, no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from thresholds import COMPILED_SUMS
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

import pq_fx.kernels.ops as pq_ops
from pq_fx.errors import ConfigError, FormatError, PQError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import (
    Quantized,
    dequantize,
    fake_quantize,
    nvfp4_global_scale,
    permute_rotate,
    quantize,
)

KEYS = (
    "int4:64:bf16",
    "int4:32:pow2",
    "int3:64:bf16",
    "int4f:64:bf16",
    "nvfp4:16:e4m3",
    "nvfp4:16:4over6",
    "mxfp4:32:e8m0",
    "fp8:0:fp32",
)
K, N = 192, 40
ops = torch.ops.pq


def inductor(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Inductor with the ops replaced by their plain-PyTorch forms."""
    return compile_fx(
        gm, inputs, decompositions={**select_decomp_table(), **pq_ops.decompositions()}
    )


def packed_weight(key: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(packed, scale, global scale, float values) of a random weight [N, K]."""
    fmt = Format.parse(key)
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    g = nvfp4_global_scale(w.abs().amax()) if fmt.two_level else None
    q = quantize(w, fmt, global_scale=g)
    return pack(q.codes, fmt), q.scale, g, dequantize(q, fmt)


def tail(key: str, carrier: str, rotation: int = 16) -> tuple[Any, ...]:
    """The arguments that all quantize ops end with."""
    g = torch.tensor(0.002) if key.startswith("nvfp4") else None
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(3)).int()
    return perm, g, None, key, rotation, carrier


def values(data: Tensor, scale: Tensor, key: str, g: Tensor | None) -> Tensor:
    if data.dtype == torch.float8_e4m3fn:
        return data.float() * scale
    return dequantize(Quantized(data, scale, g), Format.parse(key))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("carrier", ["codes", "e4m3"])
@pytest.mark.parametrize("key", KEYS)
def test_schemas_fakes_and_tags(key: str, carrier: str) -> None:
    x = torch.randn(2, 5, K)
    mod = torch.randn(2, K)
    end = tail(key, carrier)
    packed, scale, g, _ = packed_weight(key)
    data, data_scale = ops.quantize(x, *end)
    bias = torch.randn(N)
    checks = ["test_faketensor"]
    if carrier == "codes" and not key.startswith("nvfp4"):
        checks.append("test_schema")  # it cannot compare float8 tensors
    for op, args in (
        (ops.quantize, (x, *end)),
        (ops.norm_quantize, (x, "layer", None, None, 1e-6, mod, mod, *end)),
        (ops.act_quantize, (x, x, "gelu", None, *end)),
        (
            ops.act_quantize,
            (x[..., 64:], None, "silu", x[..., :64], end[0], end[1], torch.tensor(0.9), *end[3:]),
        ),
        (ops.linear, (data, data_scale, end[1], key, packed, scale, g, key, bias, torch.bfloat16)),
        (ops.linear_weight_only, (x, packed, scale, g, key, None)),
    ):
        torch.library.opcheck(op.default, args, test_utils=checks)
        assert torch.Tag.pt2_compliant_tag in op.default.tags
        assert not op.default._schema.is_mutable


@pytest.mark.parametrize("carrier", ["codes", "e4m3"])
@pytest.mark.parametrize("key", KEYS)
def test_norm_modulation_permutation_rotation_against_formulas(key: str, carrier: str) -> None:
    x = torch.randn(2, 7, K) * 3 + 1
    weight, bias = torch.rand(K) + 0.5, torch.randn(K)
    scale, shift = torch.randn(2, 1, K) * 0.3, torch.randn(2, 1, K)
    perm, g, _, _, rotation, _ = end = tail(key, carrier)
    hadamard = torch.tensor(
        [[(-1.0) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    )
    for norm in ("layer", "rms"):
        wide = x.double()
        if norm == "layer":
            y = (wide - wide.mean(-1, True)) / (
                wide.var(-1, keepdim=True, correction=0) + 1e-5
            ).sqrt()
        else:
            y = wide / (wide.square().mean(-1, True) + 1e-5).sqrt()
        y = (y * weight + bias) * (1 + scale) + shift
        y = y[..., perm.long()].reshape(2, 7, K // rotation, rotation) @ hadamard.double() / 4
        want, _ = ops.quantize(y.reshape(2, 7, K).float(), None, g, None, key, 0, carrier)
        got, _ = ops.norm_quantize(x, norm, weight, bias, 1e-5, scale, shift, *end)
        assert (got.view(torch.uint8) != want.view(torch.uint8)).float().mean() < 0.01
        # Modulation [B, K] is that of [B, 1, K].
        two_axes = ops.norm_quantize(x, norm, weight, bias, 1e-5, scale[:, 0], shift[:, 0], *end)
        assert same_bits(two_axes[0], got)
        other = ops.norm_quantize(x, norm, weight, bias, 1e-5, shift, scale, *end)[0]
        assert (other.view(torch.uint8) != want.view(torch.uint8)).float().mean() > 0.1


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "relu", "none"])
def test_act_quantize_against_torch(act: str) -> None:
    x, gate = torch.randn(3, K), torch.randn(3, K)
    formulas: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "none": lambda t: t,
    }
    end = (None, None, None, "fp8:0:fp32", 0, "codes")
    for half in (x, x.bfloat16()):
        got = values(*ops.act_quantize(half, gate, act, None, *end), "fp8:0:fp32", None)
        want = formulas[act](half.float()) * gate
        torch.testing.assert_close(got, want, rtol=2**-4, atol=want.abs().max().item() * 2**-16)


@pytest.mark.parametrize("key", KEYS)
def test_linear_is_the_product_of_the_dequantized(key: str) -> None:
    x = torch.randn(2, 5, K)
    packed, scale, g, w = packed_weight(key)
    bias = torch.randn(N)
    want = x.double() @ w.double().T + bias
    got = ops.linear_weight_only(x, packed, scale, g, key, bias)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    assert ops.linear_weight_only(x.bfloat16(), packed, scale, g, key, bias).dtype == torch.bfloat16
    for carrier in ("codes", "e4m3"):
        end = tail(key, carrier)
        data, data_scale = ops.quantize(x, *end)
        weights = (packed, scale, g, key)
        got = ops.linear(data, data_scale, end[1], key, *weights, bias, torch.float32)
        want = values(data, data_scale, key, end[1]).double() @ w.double().T + bias
        error = (got - want).norm() / want.norm()
        # "e4m3" rounds the weight to 4 significant bits, unless its scale is exact there.
        assert error < (
            1e-6 if carrier == "codes" or key.startswith(("mxfp4", "int4:32", "fp8")) else 0.03
        )
        empty = ops.linear(data[:0], data_scale[:0], end[1], key, *weights, None, torch.float16)
        assert empty.shape == (0, 5, N) and empty.dtype == torch.float16


@pytest.mark.parametrize(
    ("key", "carrier"),
    [
        ("int4:64:bf16", "codes"),
        ("int4:64:bf16", "e4m3"),
        ("int4:32:pow2", "codes"),
        ("nvfp4:16:e4m3", "codes"),
    ],
)
def test_compiled_codes_are_the_eager_ones_at_any_row_count(key: str, carrier: str) -> None:
    end = tail(key, carrier)

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.quantize(x, *end)

    compiled = torch.compile(quantized, backend=inductor, fullgraph=True)
    for rows in (5, 9, 12):
        x = torch.randn(2, rows, K) * torch.rand(K) ** 2
        x[0, 0] = 0.0
        torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            for got, want in zip(compiled(x), quantized(x), strict=True):
                assert same_bits(got, want)


def test_compiled_layer_is_the_eager_one() -> None:
    key = "int3:64:bf16"
    packed, scale, g, _ = packed_weight(key)
    bias = torch.randn(N, dtype=torch.bfloat16)
    end = tail(key, "codes")

    def layer(x: Tensor) -> tuple[Tensor, ...]:
        normed = ops.norm_quantize(x, "rms", None, None, 1e-6, None, None, *end)
        y = ops.linear(*normed, end[1], key, packed, scale, g, key, bias, torch.bfloat16)
        # Quantized again: the compiled graph must not see y before its rounding to bf16.
        return (y, *ops.quantize(y.repeat(1, 1, 5)[..., :K], *end))

    x = torch.randn(2, 7, K)
    with torch.no_grad():
        got = torch.compile(layer, backend=inductor, fullgraph=True, dynamic=False)(x)
        want = layer(x)
    torch.testing.assert_close(got[0], want[0], **COMPILED_SUMS)
    assert (got[1] != want[1]).float().mean() < 0.01


def test_decompositions_trace_with_symbolic_rows() -> None:
    end = tail("int3:64:bf16", "codes")
    decompositions = pq_ops.decompositions()
    assert len(decompositions) == 6

    def f(x: Tensor, perm: Tensor) -> tuple[Tensor, Tensor]:
        return ops.act_quantize(x, None, "silu", None, perm, *end[1:])

    graph = torch.fx.experimental.proxy_tensor.make_fx(
        f, decomposition_table=decompositions, tracing_mode="symbolic"
    )(torch.randn(3, 5, K), end[0])
    assert not any("pq." in str(node.target) for node in graph.graph.nodes)
    x = torch.randn(2, 11, K)
    for got, want in zip(graph(x, end[0]), f(x, end[0]), strict=True):
        assert same_bits(got, want)


def test_backward_raises_a_named_error_and_the_forward_does_not() -> None:
    packed, scale, g, _ = packed_weight("int4:64:bf16")
    end = tail("int4:64:bf16", "codes")
    bias = torch.randn(N, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        data, s = ops.act_quantize(x, None, "silu", None, *end)
        y = ops.linear(
            data, s, None, "int4:64:bf16", packed, scale, g, "int4:64:bf16", bias, x.dtype
        )
        return y + ops.linear_weight_only(x, packed, scale, g, "int4:64:bf16", bias)

    x = torch.randn(3, K, requires_grad=True)
    want = f(x)
    with pytest.raises(PQError, match=r"backward through pq::linear.*inference only.*no_grad"):
        want.sum().backward()
    compiled = torch.compile(f, backend=inductor, fullgraph=True)
    got = compiled(x)  # in grad mode: traced with its backward, and still runs
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(PQError, match="inference only"):
        got.sum().backward()
    with torch.no_grad():
        assert torch.equal(f(x), want)


def test_a_quantized_activation_alone_has_no_silent_gradient() -> None:
    packed, scale, g, _ = packed_weight("int4:64:bf16")
    x = torch.randn(3, K, requires_grad=True)
    for carrier in ("codes", "e4m3"):
        data, s = ops.quantize(x, None, None, None, "int4:64:bf16", 0, carrier)
        weights = (packed, scale, g, "int4:64:bf16")
        y = ops.linear(data, s, None, "int4:64:bf16", *weights, None, torch.float32)
        with pytest.raises(PQError, match="inference only"):
            (y.sum() + x.sum()).backward()
        assert x.grad is None


@pytest.mark.parametrize("key", KEYS)
def test_clip_is_a_smaller_amax_and_a_saturation(key: str) -> None:
    x = torch.randn(3, K)
    perm, g, _, _, rotation, _ = tail(key, "codes")
    clipped = values(*ops.quantize(x, perm, g, torch.tensor(0.75), key, rotation, "codes"), key, g)
    plain = values(*ops.quantize(x, perm, g, None, key, rotation, "codes"), key, g)
    one = values(*ops.quantize(x, perm, g, torch.tensor(1.0), key, rotation, "codes"), key, g)
    assert torch.equal(one, plain)
    want = fake_quantize(
        permute_rotate(x, perm, rotation), Format.parse(key), global_scale=g, scale_search=(0.75,)
    )
    assert torch.equal(clipped, want)
    # Where scales are no powers of two and groups do not choose, the row's largest value is cut off at 0.75 of itself.
    if not key.startswith(("mxfp4", "int4:32", "nvfp4:16:4over6")):
        ratio = clipped.abs().amax() / plain.abs().amax()
        assert 0.65 < ratio < 0.85  # e4m3 scales are 6 % coarse


def test_channels_before_are_the_first_of_the_row() -> None:
    before, x, gate = torch.randn(2, 3, 64), torch.randn(2, 3, K - 64), torch.randn(2, 3, K - 64)
    end = tail("int4:64:bf16", "e4m3")
    got = ops.act_quantize(x, gate, "silu", before, *end)
    row = torch.cat([before, F.silu(x) * gate], dim=-1)
    for a, b in zip(got, ops.quantize(row, *end), strict=True):
        assert same_bits(a, b)
    swapped = torch.cat([F.silu(x) * gate, before], dim=-1)
    assert not same_bits(got[0], ops.quantize(swapped, *end)[0])


def test_errors_list_what_is_known() -> None:
    x = torch.randn(2, K)
    with pytest.raises(
        ConfigError, match="unknown carrier 'bytes'; known: codes, int8, e2m1, e4m3"
    ):
        ops.quantize(x, None, None, None, "int4:64:bf16", 0, "bytes")
    with pytest.raises(ConfigError, match="unknown norm 'batch'; known: layer, rms"):
        ops.norm_quantize(
            x, "batch", None, None, 1e-6, None, None, None, None, None, "int4:64:bf16", 0, "codes"
        )
    with pytest.raises(ConfigError, match="unknown act 'swish'; known: gelu, gelu_tanh, silu"):
        ops.act_quantize(x, None, "swish", None, None, None, None, "int4:64:bf16", 0, "codes")
    with pytest.raises(FormatError, match="K=192 .* group of 128"):
        ops.quantize(x, None, None, None, "int4:128:bf16", 0, "codes")
    packed, scale, g, _ = packed_weight("int3:64:bf16")
    with pytest.raises(FormatError, match="K=192 channels but the int4:64:bf16 weight holds 144"):
        ops.linear_weight_only(x, packed, scale, g, "int4:64:bf16", None)
    with pytest.raises(FormatError, match=r"torch.float32 belongs to no carrier"):
        ops.linear(x, x, None, "int3:64:bf16", packed, scale, g, "int3:64:bf16", None, x.dtype)


def test_meta_tensors_get_shapes() -> None:
    data, scale = ops.quantize(
        torch.empty(2, 3, K, device="meta"), None, None, None, "nvfp4:16:e4m3", 0, "codes"
    )
    assert data.shape == (2, 3, K) and scale.shape == (2, 3, 12)
    assert scale.dtype == torch.float8_e4m3fn and data.device.type == "meta"
