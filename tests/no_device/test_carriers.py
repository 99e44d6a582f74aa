"""Carriers: every exact form of quantized activations holds the same values, and gives the same linear."""

from __future__ import annotations

import pytest
import torch

from pq_fx.errors import FormatError, PQError
from pq_fx.kernels import devices
from pq_fx.kernels.carriers import CARRIERS, carried_values, carries
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import Quantized, dequantize, element_values, quantize
from pq_fx.modules import ActivationQuantizer, QuantLinear

KEYS = (
    "int4:64:bf16",
    "int3:32:pow2",
    "int8:0:fp32",
    "int4f:32:bf16",
    "nvfp4:16:e4m3",
    "nvfp4:16:4over6",
    "mxfp4:32:e8m0",
    "fp8:0:fp32",
)
K, N = 192, 40
ops = torch.ops.pq
EXACT = [
    (carrier, key)
    for carrier in ("int8", "e2m1")
    for key in KEYS
    if carries(carrier, Format.parse(key))
]


def global_of(key: str) -> torch.Tensor | None:
    return torch.tensor(0.003) if key.startswith("nvfp4") else None


def weight_of(key: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    fmt = Format.parse(key)
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    q = quantize(w, fmt, global_scale=global_of(key))
    return pack(q.codes, fmt), q.scale, global_of(key)


def test_what_carries_what() -> None:
    assert [k for c, k in EXACT if c == "int8"] == [*KEYS[:4], "mxfp4:32:e8m0"]
    assert [k for c, k in EXACT if c == "e2m1"] == [
        "nvfp4:16:e4m3",
        "nvfp4:16:4over6",
        "mxfp4:32:e8m0",
    ]
    x = torch.randn(2, K)
    for carrier, key in (
        ("int8", "fp8:0:fp32"),
        ("int8", "int4:16:bf16"),
        ("e2m1", "int4:64:bf16"),
    ):
        with pytest.raises(FormatError, match=f"'{carrier}' cannot hold {key}; use 'codes'"):
            ops.quantize(x, None, None, None, key, 0, carrier)


@pytest.mark.parametrize(("carrier", "key"), EXACT)
def test_values_and_linears_are_those_of_the_codes(carrier: str, key: str) -> None:
    torch.manual_seed(5)
    x, fmt, g = torch.randn(3, 7, K), Format.parse(key), global_of(key)
    codes, scale = ops.quantize(x, None, g, None, key, 16, "codes")
    data, own = ops.quantize(x, None, g, None, key, 16, carrier)
    assert torch.equal(own.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(carried_values(data, fmt), element_values(codes, fmt))
    assert data.shape[-1] == (K // 2 if carrier == "e2m1" else K)
    if carrier == "int8":  # integers as they are, e2m1 counts halves
        unit = 2 if key.startswith("mxfp4") else 1
        assert torch.equal(data.float(), element_values(codes, fmt) * unit)
    for weight_key in ("int4:64:bf16", key):
        packed = (*weight_of(weight_key), weight_key)
        want = ops.linear(codes, scale, g, key, *packed, torch.ones(N), torch.float32)
        got = ops.linear(data, own, g, key, *packed, torch.ones(N), torch.float32)
        assert torch.equal(got, want)
    wrong = ops.quantize(x.roll(1, -1), None, g, None, key, 16, carrier)
    assert not torch.equal(carried_values(wrong[0], fmt), element_values(codes, fmt))
    dense = dequantize(Quantized(codes, scale, g), fmt)
    assert (dense - ops_rotated(x)).norm() < 0.25 * dense.norm()


def ops_rotated(x: torch.Tensor) -> torch.Tensor:
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    return (x.unflatten(-1, (-1, 16)) @ torch.tensor(signs) / 4).flatten(-2)


@pytest.mark.parametrize(("carrier", "key"), EXACT)
def test_fakes(carrier: str, key: str) -> None:
    x, mod = torch.randn(2, 5, K), torch.randn(2, K)
    end = (torch.randperm(K).int(), global_of(key), None, key, 16, carrier)
    data, scale = ops.quantize(x, *end)
    packed = (*weight_of(key), key)
    for op, args in (
        (ops.quantize, (x, *end)),
        (ops.norm_quantize, (x, "rms", None, None, 1e-6, mod, None, *end)),
        (ops.act_quantize, (x[..., 64:], None, "silu", x[..., :64], *end)),
        (ops.linear, (data, scale, end[1], key, *packed, None, torch.bfloat16)),
    ):
        torch.library.opcheck(op.default, args, test_utils=["test_faketensor"])


@pytest.mark.parametrize(
    ("capability", "found"),
    [
        ((8, 0), [*["int8"] * 4, "codes", "codes", "int8", "codes"]),
        ((9, 0), ["e4m3"] * 8),
        ((10, 0), [*["codes"] * 4, "e2m1", "e2m1", "e2m1", "codes"]),
        ((12, 0), [*["codes"] * 4, "e2m1", "e2m1", "e2m1", "codes"]),
    ],
)
def test_the_carrier_of_a_module_is_the_devices(
    capability: tuple[int, int], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_name", lambda *_: f"sm_{capability[0]}{capability[1]}")
    chosen = [devices.carrier(torch.device("cuda"), key) for key in KEYS]
    assert chosen == found
    x = torch.randn(4, K)
    for key, carrier in zip(KEYS, chosen, strict=True):
        if carrier == "e4m3":
            continue
        weight, scale, whole = weight_of(key)
        quantizer = ActivationQuantizer(K, key, 16, global_scale=global_of(key))
        linear = QuantLinear(K, N, key, weight, scale, whole, None, quantizer)
        got = linear(x)
        with monkeypatch.context() as patch:
            patch.setattr(devices, "carrier", lambda *_: "codes")
            assert torch.equal(got, linear(x)), (key, carrier)


@pytest.mark.parametrize(("carrier", "key"), EXACT)
def test_no_silent_gradient(carrier: str, key: str) -> None:
    weight, scale, whole = weight_of(key)
    quantizer = ActivationQuantizer(K, key, 0, global_scale=global_of(key))
    linear = QuantLinear(K, N, key, weight, scale, whole, None, quantizer)
    x = torch.randn(3, K, requires_grad=True)
    original = devices.carrier
    devices.carrier = lambda *_: carrier
    try:
        y = linear(x)
    finally:
        devices.carrier = original
    with pytest.raises(PQError, match="inference only"):
        (y.sum() + x.sum()).backward()


@pytest.mark.parametrize(("carrier", "key"), [("int8", "int4:64:bf16"), ("e2m1", "nvfp4:16:e4m3")])
def test_compiled_models_carry_them_too(
    carrier: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norm, two linears of one input and an activation, through every pass and Inductor."""

    def linear() -> QuantLinear:
        weight, scale, whole = weight_of(key)
        return QuantLinear(K, N, key, weight, scale, whole, None, quantizer)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(K)
            self.a, self.b = linear(), linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return torch.nn.functional.gelu(self.a(y)) * self.b(y)

    quantizer = ActivationQuantizer(K, key, 16, global_scale=global_of(key))
    model, x = Model().eval(), torch.randn(5, K)
    monkeypatch.setattr(devices, "carrier", lambda *_: carrier)
    with torch.no_grad():
        want = model(x)
        got = torch.compile(model, backend="permuquant", fullgraph=True)(x)
    # A norm's sums of another order may move a code by a step.
    assert (got - want).norm() < 0.02 * want.norm()
    assert float((got - want).abs().median()) < 1e-5


def test_every_carrier_is_some_devices() -> None:
    assert {c for row in devices.TABLE.values() for c in row.carriers} == set(CARRIERS)
