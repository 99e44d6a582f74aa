"""Every op against float64 on hostile numbers and shapes; NaN and infinity reach the output and nothing else.

What is decided: a group (with the e4m3 carrier a row) that holds NaN or infinity is not finite after quantization, in
every format and on every device, so a linear of it gives NaN or infinity in that row alone, as the float model does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_under_interpreter import FIRST, KEYS, not_finite_agrees
from torch import Tensor

import pq_fx
from pq_fx.errors import CalibrationError, FormatError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import Quantized, dequantize, nvfp4_global_scale, quantize, rotate

OPS = torch.ops.pq
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a step of the coarsest place of each format over its largest value, plus what the rounding of
# the scale to its own type lets saturate (bf16 2^-9, e4m3 2^-4, a power of two up to half of amax),
# or a whole step at the short end of int3f.
HALF_STEP = {
    "int4:64:bf16": 1 / 14 + 2**-8, "int4:16:pow2": 1 / 2, "int3:64:bf16": 1 / 6 + 2**-8,
    "int3f:64:bf16": 1 / 4 + 2**-7, "nvfp4:16:e4m3": 1 / 6 + 2**-3, "nvfp4:16:4over6": 1 / 6 + 2**-3,
    "mxfp4:32:e8m0": 1 / 2,
    "fp8:0:fp32": 2**-4, "fp8:64:fp32": 2**-4, "int8:0:fp32": 1 / 254,
}  # fmt: skip
CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rows": st.sampled_from([0, 1, 3, 64]),
        "groups": st.integers(1, 3),
        "dtype": st.sampled_from(DTYPES),
        "kinds": st.lists(
            st.sampled_from(
                ["zero row", "zero group", "outlier", "tiny", "subnormal", "large", "ties"]
            ),
            max_size=3,
        ),
        "layout": st.sampled_from(["plain", "transposed", "sliced", "expanded"]),
    }
)
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def hostile(case: dict) -> Tensor:
    """x [rows, K] of the wanted kinds and memory layout, finite in its dtype."""
    g = torch.Generator().manual_seed(case["seed"])
    rows, channels = case["rows"], 64 * case["groups"]
    x = torch.randn(rows, channels, generator=g)
    if case["layout"] == "expanded":
        x = x[:1].expand(rows, channels).clone() if rows else x
    for kind in case["kinds"] if rows else ():
        row = int(torch.randint(rows, (), generator=g))
        if kind == "zero row":
            x[row] = 0
        elif kind == "zero group":
            x[row, :64] = 0
        elif kind == "outlier":
            x[row, 17] = 6e4
        elif kind == "tiny":
            x[row] *= 2.0**-14
        elif kind == "subnormal":
            x[row] *= 1e-7 if case["dtype"] == torch.float16 else 1e-39
        elif kind == "large":
            x[row] = x[row].clamp(-4, 4) * (1e4 if case["dtype"] == torch.float16 else 1e15)
        else:
            x[row] = torch.randint(-14, 15, (channels,), generator=g) * 0.5
    x = x.to(case["dtype"])
    if case["layout"] == "transposed":
        return x.t().contiguous().t()
    if case["layout"] == "sliced":
        return torch.cat([x, x], dim=-1)[:, : x.shape[-1]]
    return x


def whole_of(x: Tensor, fmt: Format) -> Tensor | None:
    if not fmt.two_level:
        return None
    return nvfp4_global_scale(x.float().abs().amax() if x.numel() else torch.tensor(1.0))


def check_near(q: tuple[Tensor, Tensor], whole: Tensor | None, exact: Tensor, key: str) -> None:
    """Dequantized codes are within half a step of `exact` float64 [rows, K], group by group."""
    fmt = Format.parse(key)
    got = dequantize(Quantized(*q, whole), fmt).double()
    size = fmt.group_size or exact.shape[-1]
    groups, exact = got.unflatten(-1, (-1, size)), exact.unflatten(-1, (-1, size))
    amax = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact[..., :1]
    # Below the smallest scale (2^-100; nvfp4: e4m3's 2^-6 of the tensor's; mxfp4: 2^-127) steps stop shrinking.
    floor = 2.0**-99 if whole is None else float(whole) * 2**-7
    assert bool(((groups - exact).abs() <= amax * (HALF_STEP[key] + 2**-20) + floor).all())


@pytest.mark.parametrize("key", KEYS)
@PROPERTY
@given(case=CASES)
def test_quantize(key: str, case: dict) -> None:
    fmt, x = Format.parse(key), hostile(case)
    whole = whole_of(x, fmt)
    q = OPS.quantize(x, None, whole, None, key, 0, "codes")
    check_near(q, whole, x.double(), key)
    plain = OPS.quantize(x.contiguous(), None, whole, None, key, 0, "codes")
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(q, plain, strict=True)
    )
    perm = torch.randperm(x.shape[-1]).int()
    turned = OPS.quantize(x, perm, None, None, "fp8:0:fp32", 16, "codes")
    check_near(turned, None, rotate(x.double()[:, perm.long()], 16), "fp8:0:fp32")


@pytest.mark.parametrize("key", KEYS)
@PROPERTY
@given(case=CASES, norm=st.sampled_from(["layer", "rms"]))
def test_norm_quantize(key: str, case: dict, norm: str) -> None:
    fmt, x = Format.parse(key), hostile(case)
    wide = x.double()
    if norm == "layer":
        exact = F.layer_norm(wide, x.shape[-1:], eps=1e-6)
    else:
        exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    exact = exact.float().to(x.dtype).double()
    whole = whole_of(exact, fmt)
    q = OPS.norm_quantize(x, norm, None, None, 1e-6, None, None, None, whole, None, key, 0, "codes")
    # fp32 sums and the rounding to x's dtype may fall on the other side: one unit of the last place.
    unit = torch.finfo(x.dtype).eps * 2 + 4e-6
    got = dequantize(Quantized(*q, whole), fmt).double()
    size = fmt.group_size or x.shape[-1]
    amax = exact.unflatten(-1, (-1, size)).abs().amax(-1).repeat_interleave(size, -1)
    floor = 1e-30 if whole is None else float(whole) * 2**-7
    assert bool(((got - exact).abs() <= amax * (HALF_STEP[key] + unit) + floor).all())


@pytest.mark.parametrize("key", KEYS)
@PROPERTY
@given(case=CASES, act=st.sampled_from(["gelu", "gelu_tanh", "silu", "relu", "none"]))
def test_act_quantize(key: str, case: dict, act: str) -> None:
    fmt, x = Format.parse(key), hostile(case)
    gate = torch.randn(x.shape).to(x.dtype)
    functions = {
        "gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "silu": F.silu, "relu": F.relu,
        "none": lambda v: v,
    }  # fmt: skip
    exact = functions[act](x.double()) * gate.double()
    if x.dtype == torch.float16:
        gate = gate.clamp(-1, 1)  # a product beyond 65504 is an infinity: test_not_finite
        exact = functions[act](x.double()) * gate.double()
    whole = whole_of(exact, fmt)
    q = OPS.act_quantize(x, gate, act, None, None, whole, None, key, 0, "codes")
    unit = torch.finfo(x.dtype).eps * 2 + 4e-6
    got = dequantize(Quantized(*q, whole), fmt).double()
    size = fmt.group_size or x.shape[-1]
    amax = exact.unflatten(-1, (-1, size)).abs().amax(-1).repeat_interleave(size, -1)
    floor = 1e-7 if whole is None else float(whole) * 2**-7 + 1e-7  # fp16 subnormals, tails of gelu
    assert bool(((got - exact).abs() <= amax * (HALF_STEP[key] + unit) + floor).all())


@pytest.mark.parametrize("key", KEYS)
@PROPERTY
@given(case=CASES, columns=st.sampled_from([1, 5, 48]))
def test_linears(key: str, case: dict, columns: int) -> None:
    """linear, linears and linear_weight_only: products of the dequantized in float64, any N."""
    fmt, x = Format.parse(key), hostile(case)
    weight = torch.randn(columns, x.shape[-1])
    w = quantize(weight, fmt, global_scale=whole_of(weight, fmt))
    packed, bias = pack(w.codes, fmt), torch.randn(columns)
    whole = whole_of(x, fmt)
    q = OPS.quantize(x, None, whole, None, key, 0, "codes")
    rest = (packed, w.scale, w.global_scale, key, bias)
    y = OPS.linear(*q, whole, key, *rest, torch.float32)
    one = OPS.linear_weight_only(x, *rest)
    for got, inputs in ((y, dequantize(Quantized(*q, whole), fmt)), (one, x)):
        a, b = inputs.double(), dequantize(w, fmt).double()
        exact, size = a @ b.t() + bias.double(), a.abs() @ b.abs().t() + bias.abs().double()
        unit = torch.finfo(got.dtype).eps
        inside = size < torch.finfo(got.dtype).max / 2
        assert bool(((got.double() - exact).abs() <= size * (1e-5 + unit) + 1e-7)[inside].all())
    twice = OPS.linears(
        *q,
        whole,
        key,
        [packed] * 2,
        [w.scale] * 2,
        [w.global_scale] * 2,
        key,
        [bias] * 2,
        torch.float32,
    )
    assert torch.equal(twice, torch.cat([y, y], dim=-1))


# NaN and infinity --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("carrier", ["codes", "e4m3"])
def test_not_finite_reaches_the_output_of_its_row_alone(key: str, bad: float, carrier: str) -> None:
    fmt = Format.parse(key)
    weight = torch.randn(7, 128)
    w = quantize(weight, fmt, global_scale=whole_of(weight, fmt))
    x = torch.randn(5, 128)
    whole = whole_of(x, fmt)
    rest = (pack(w.codes, fmt), w.scale, w.global_scale, key, None)
    for name, first in FIRST.items():
        if name == "act_quantize" and bad < 0:
            continue  # relu takes minus infinity to 0, as in the float model
        clean = getattr(OPS, name)(x, *first, None, whole, None, key, 0, carrier)
        spoiled = x.clone()
        spoiled[2, 70] = bad
        dirty = getattr(OPS, name)(spoiled, *first, None, whole, None, key, 0, carrier)
        y, z = (OPS.linear(*q, whole, key, *rest, torch.bfloat16) for q in (clean, dirty))
        assert not z[2].isfinite().any()
        others = [0, 1, 3, 4]
        assert torch.equal(y[others], z[others]) and y.isfinite().all()
    spoiled = x.clone()
    spoiled[2, 70] = bad
    z = OPS.linear_weight_only(spoiled, *rest)
    assert not z[2].isfinite().any() and z[[0, 1, 3, 4]].isfinite().all()


def test_fp16_overflow_is_an_infinity_and_not_a_large_number() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)
    for key in KEYS:
        whole = whole_of(torch.tensor([6e4]), Format.parse(key))
        q = OPS.act_quantize(x, x, "none", None, None, whole, None, key, 0, "codes")  # 90000
        assert not dequantize(Quantized(*q, whole), Format.parse(key)).isfinite().any()


def test_the_kernels_agree_about_it(tmp_path: Path) -> None:
    """In Triton's interpreter: which elements of which row are finite, for every op, format, carrier and rotation."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    script = Path(__file__).parents[1] / "numbers_under_interpreter.py"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"compared": 120, "different": [], "ties": [True] * 4}
    assert callable(not_finite_agrees)


def test_weights_that_are_not_finite_are_named() -> None:
    import toy

    model = toy.toy()
    model.blocks[-1].down.weight.data[3, 5] = torch.nan
    quantizer = toy.calibrated(model)
    with pytest.raises(
        CalibrationError, match=r"blocks\.1\.down\.weight: the weight holds NaN or infinity"
    ):
        quantizer.convert()


# Shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("channels", [1, 40, 65, 96])
def test_channels_that_are_no_multiple_are_refused(key: str, channels: int) -> None:
    fmt = Format.parse(key)
    if fmt.group_size == 0 or channels % fmt.group_size == 0:
        return
    with pytest.raises(FormatError, match=f"K={channels} channels are not a multiple"):
        OPS.quantize(torch.randn(2, channels), None, None, None, key, 0, "codes")


@pytest.mark.parametrize("batch", [0, 1, 64])
def test_batches_are_rows(batch: int) -> None:
    """A layer of odd N gives each row of a batch the bits that it gives the row alone; rows may be none."""
    import toy

    config = pq_fx.QuantConfig("int4", group_size=16, method="permuquant", calibration_rows=64)
    model = toy.quantized(toy.toy(blocks=1), config)
    x = torch.randn(batch, 5, toy.WIDTH)
    up = model.blocks[0].up
    y = up(x)
    assert y.shape == (batch, 5, 2 * toy.WIDTH)
    for i in range(0, batch, 21):
        assert torch.allclose(up(x[i : i + 1]), y[i : i + 1], rtol=1e-5, atol=1e-6)
    assert torch.equal(up(x.transpose(0, 1)), up(x.transpose(0, 1).contiguous()))
