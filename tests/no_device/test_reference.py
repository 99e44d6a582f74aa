"""The reference quantizers against loops in float64, and their properties on hard inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_formats import hadamard, integer_group, nvfp4_group, pow2_candidates, quantize_group
from torch import Tensor

from pq_fx.errors import FormatError
from pq_fx.kernels.formats import FORMAT_NAMES, Format, get_format
from pq_fx.kernels.reference import (
    NVFP4_CLIP_RATIOS,
    WEIGHT_CLIP_RATIOS,
    Quantized,
    at_scales,
    dequantize,
    e4m3_operand,
    element_values,
    fake_quantize,
    group_scales,
    nvfp4_global_scale,
    permute_rotate,
    quantize,
    rotate,
    scale_values,
)

KEYS = (
    "int4:64:bf16",
    "int4:16:pow2",
    "int3:32:bf16",
    "int3:64:pow2",
    "int4f:64:bf16",
    "int3f:16:bf16",
    "nvfp4:16:e4m3",
    "nvfp4:16:4over6",
    "mxfp4:32:e8m0",
    "fp8:0:fp32",
    "fp8:32:fp32",
    "int8:0:fp32",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hard_rows(channels: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of many kinds: plain, zeros, one outlier, tiny, subnormal, ties, heavy tails."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(9, channels, generator=g)
    x[1] = 0.0
    x[2, 5] = 3.0e4
    x[3] *= 2.0**-20
    x[4] *= 1e-39 if dtype != torch.float16 else 1e-7
    x[5] = torch.randint(-14, 15, (channels,), generator=g) * 0.5  # many exact ties
    x[6] = x[6] ** 5
    x[7, ::2] = -0.0
    x[8] = 7.0
    return x.to(dtype)


def grouped(x: Tensor, fmt: Format) -> list[list[float]]:
    return x.double().reshape(-1, fmt.group_size or x.shape[-1]).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_against_a_loop(key: str, dtype: torch.dtype) -> None:
    fmt = Format.parse(key)
    x = hard_rows(192, dtype, seed=len(key))
    tensor_scale = nvfp4_global_scale(x.abs().amax()) if fmt.two_level else None
    for global_scale in {None, tensor_scale}:
        q = quantize(x, fmt, global_scale=global_scale)
        scales = scale_values(q.scale, fmt, global_scale).double().flatten().tolist()
        codes = q.codes.reshape(len(scales), -1).tolist()
        values = dequantize(q, fmt).double().reshape(len(scales), -1).tolist()
        for i, group in enumerate(grouped(x, fmt)):
            if fmt.scale == "pow2":
                top = int(fmt.max_value)
                choices = pow2_candidates(group, top)
                assert scales[i] in choices
                errors = [math.dist(group, integer_group(group, top, s)[1]) ** 2 for s in choices]
                slack = len(group) * 2.0**-13 * choices[0] ** 2
                assert errors[choices.index(scales[i])] <= min(errors) + slack
                integers, expected = integer_group(group, top, scales[i])
                want = [abs(v) + (top + 1 if v < 0 else 0) for v in integers]
            elif fmt.scale == "4over6":
                number = None if global_scale is None else global_scale.item()
                six, four = (nvfp4_group(group, number, ratio) for ratio in (1.0, 1.5))
                assert scales[i] in (six[1], four[1])
                want, _, expected = four if scales[i] == four[1] else six
                least = min(math.dist(group, found[2]) ** 2 for found in (six, four))
                assert (
                    math.dist(group, expected) ** 2 <= least + len(group) * 2.0**-6 * four[1] ** 2
                )
            else:
                number = None if global_scale is None else global_scale.item()
                want, scale, expected = quantize_group(group, fmt.name, fmt.scale, number)
                assert scales[i] == scale
            assert codes[i] == want
            assert values[i] == [float(torch.tensor(v, dtype=torch.float32)) for v in expected]


def test_a_wrong_group_size_is_not_the_same() -> None:
    x = hard_rows(192, torch.float32, 3)
    narrow, wide = (fake_quantize(x, get_format("int4", g)) for g in (32, 64))
    assert not torch.equal(narrow, wide)
    assert (narrow - x).square().sum() < (wide - x).square().sum()


@settings(deadline=None, max_examples=40)
@given(
    key=st.sampled_from(KEYS),
    rows=st.integers(0, 7),
    units=st.integers(1, 5),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(
    key: str, rows: int, units: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    fmt = Format.parse(key)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 64 * units, generator=g) * 2.0 ** (
        exponent // (3 - 2 * (dtype != torch.float16))
    )
    x = x.to(dtype)
    global_scale = nvfp4_global_scale(x.abs().amax()) if fmt.two_level and rows else None
    q = quantize(x, fmt, global_scale=global_scale)
    y = dequantize(q, fmt)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    s = scale_values(q.scale, fmt, global_scale).repeat_interleave(
        x.shape[-1] // q.scale.shape[-1], -1
    )
    scaled = x.float() / s
    size, top = scaled.abs(), fmt.max_value - fmt.full_range * (scaled > 0).float()
    clipped = size > top
    # pow2 and mxfp4's floor exponent clip by up to a factor of two, the others by a rounding.
    assert (size <= fmt.max_value * (2.01 if fmt.scale in ("pow2", "e8m0") else 1.07)).all()
    # Widest step that a value of that size can meet.
    if fmt.element == "e2m1":
        step = torch.where(size > 4, 2.0, torch.where(size > 2, 1.0, 0.5))
    elif fmt.element == "e4m3":
        step = 2.0 ** (size.clamp(min=2.0**-6).log2().floor() - 3 + 1)
    else:
        step = torch.ones_like(size)
    error = (y - x.float()).abs() / s.abs()
    assert (error[~clipped] <= step[~clipped] * 0.5 * (1 + 1e-5)).all()
    assert torch.equal(y.abs()[clipped], (s.abs() * top)[clipped])


@pytest.mark.parametrize("key", [k for k in KEYS if "pow2" not in k])
def test_quantizing_again_changes_nothing(key: str) -> None:
    fmt = Format.parse(key)
    x = hard_rows(192, torch.float32, 5)[[0, 1, 2, 3, 5, 7, 8]]
    once = fake_quantize(x, fmt)
    again = fake_quantize(once, fmt)
    if fmt.name in ("int4", "int3", "int4f", "int3f", "mxfp4"):
        assert torch.equal(once, again)
    else:  # amax / max_value may round one bit away from the scale that made amax
        torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", KEYS)
def test_zeros_give_zeros_and_a_finite_scale(key: str) -> None:
    fmt = Format.parse(key)
    for x in (torch.zeros(3, 64), -torch.zeros(3, 64)):
        q = quantize(x, fmt)
        assert torch.equal(dequantize(q, fmt), torch.zeros(3, 64))
        assert torch.isfinite(scale_values(q.scale, fmt)).all()
        if fmt.name in ("int4", "int3", "int8"):
            assert (q.codes == 0).all()
        if fmt.full_range:
            assert (q.codes == fmt.max_value).all() and (q.scale > 0).all()
        data, row = e4m3_operand(q, fmt)
        assert torch.equal(data.float(), torch.zeros(3, 64))
        assert (torch.isfinite(row) & (row > 0)).all()


@pytest.mark.parametrize("name", ["int4", "int3"])
@pytest.mark.parametrize("scale", ["bf16", "pow2"])
def test_integers_have_no_negative_zero(name: str, scale: str) -> None:
    fmt = get_format(name, 16, scale)
    codes = quantize(torch.randn(400, 64) * 0.2, fmt).codes
    assert not (codes == fmt.max_value + 1).any()


@pytest.mark.parametrize("key", KEYS)
def test_not_finite_input_is_not_hidden(key: str) -> None:
    fmt = Format.parse(key)
    x = torch.randn(4, 64)
    x[1, 3] = math.nan
    y = fake_quantize(x, fmt)
    assert torch.isnan(y[1]).any()
    assert torch.isfinite(y[[0, 2, 3]]).all()


@pytest.mark.parametrize("key", KEYS)
def test_shapes_views_and_empty_inputs(key: str) -> None:
    fmt = Format.parse(key)
    x = torch.randn(64, 3, 5).permute(2, 1, 0)
    assert not x.is_contiguous()
    q, same = quantize(x, fmt), quantize(x.contiguous(), fmt)
    assert q.codes.shape == (5, 3, 64)
    assert q.scale.shape == (5, 3, fmt.groups(64))
    assert torch.equal(q.codes, same.codes)
    assert torch.equal(dequantize(q, fmt), dequantize(same, fmt))
    vector = quantize(x[2, 1], fmt)
    assert torch.equal(vector.codes, q.codes[2, 1])
    for empty in (torch.empty(0, 64), torch.empty(2, 0, 64)):
        q = quantize(empty, fmt)
        assert dequantize(q, fmt).shape == empty.shape
        assert [t.shape for t in e4m3_operand(q, fmt)] == [empty.shape, (*empty.shape[:-1], 1)]


def test_scale_search_is_the_best_of_its_ratios() -> None:
    x = hard_rows(192, torch.float32, 8)[[0, 2, 5, 6]]
    for fmt, ratios in (
        (get_format("int4"), WEIGHT_CLIP_RATIOS),
        (get_format("int3", 32), WEIGHT_CLIP_RATIOS),
        (get_format("nvfp4"), NVFP4_CLIP_RATIOS),
        (get_format("mxfp4"), (1.0, 2.0, 0.5)),
    ):

        def group_errors(y: Tensor, size: int = fmt.group_size) -> Tensor:
            return (y - x).square().reshape(-1, size).sum(-1)

        found = group_errors(fake_quantize(x, fmt, scale_search=ratios))
        plain = group_errors(fake_quantize(x, fmt))
        each = torch.stack([group_errors(fake_quantize(x, fmt, scale_search=(r,))) for r in ratios])
        torch.testing.assert_close(found, each.amin(0), rtol=1e-5, atol=0)
        assert (found <= plain * (1 + 1e-5)).all()
        groups = 192 // fmt.group_size  # of the first row, plain random numbers
        assert found[:groups].sum() < plain[:groups].sum() * 0.99
    assert len(WEIGHT_CLIP_RATIOS) == 16


def test_errors() -> None:
    with pytest.raises(FormatError, match="K=96 .* group of 64"):
        quantize(torch.randn(2, 96), get_format("int4"))
    with pytest.raises(FormatError, match="only nvfp4"):
        quantize(torch.randn(2, 64), get_format("int4"), global_scale=torch.tensor(1.0))
    for size in (3, 48, -2, 128):
        with pytest.raises(FormatError, match=f"rotation size {size} .* K=192"):
            rotate(torch.randn(2, 192), size)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128])
def test_rotation_is_sylvesters_matrix(size: int) -> None:
    matrix = torch.from_numpy(hadamard(size))
    eye = torch.eye(size, dtype=torch.float64)
    got = rotate(eye, size)
    torch.testing.assert_close(got, matrix, rtol=1e-15, atol=0)
    torch.testing.assert_close(got @ got.T, eye, rtol=0, atol=1e-15)
    assert torch.equal(got, got.T)
    x = torch.randn(3, 5, 3 * size, dtype=torch.float64)
    want = (x.reshape(3, 5, 3, size) @ matrix).reshape(x.shape)
    torch.testing.assert_close(rotate(x, size), want, rtol=1e-12, atol=1e-12)
    assert rotate(x.bfloat16(), size).dtype == torch.float32


def test_permuting_and_rotating_both_operands_keeps_the_product() -> None:
    x = torch.randn(7, 192, dtype=torch.float64)
    w = torch.randn(11, 192, dtype=torch.float64)
    perm, other = torch.randperm(192).int(), torch.randperm(192).int()
    want = x @ w.T
    for p in (perm, perm.long(), None):
        got = permute_rotate(x, p, 64) @ permute_rotate(w, p, 64).T
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    wrong = permute_rotate(x, perm, 64) @ permute_rotate(w, other, 64).T
    assert (wrong - want).abs().max() > 1
    wrong = permute_rotate(x, perm, 64) @ permute_rotate(w, perm, 32).T
    assert (wrong - want).abs().max() > 1


@pytest.mark.parametrize("key", KEYS)
def test_e4m3_carrier(key: str) -> None:
    fmt = Format.parse(key)
    q = quantize(hard_rows(192, torch.float32, 9), fmt)
    data, row = e4m3_operand(q, fmt)
    assert data.dtype == torch.float8_e4m3fn and row.dtype == torch.float32
    got = data.double() * row.double()
    want = dequantize(q, fmt).double()
    if fmt.scale in ("pow2", "e8m0") or fmt.key == "fp8:0:fp32":
        rows = [0, 1, 2, 3, 5, 6, 7, 8]  # row 4 lies below the floor of a row scale for mxfp4
        assert torch.equal((data.float() * row)[rows], dequantize(q, fmt)[rows])
    # e4m3 has 4 significant bits; below 2^-6 of the operand its step is 2^-9.
    assert ((got - want).abs() <= torch.maximum(want.abs() * 2.0**-4, row * 2.0**-10) * 1.001).all()
    if fmt.element == "e4m3" and fmt.group_size == 0:
        assert torch.equal(data.view(torch.uint8), q.codes)
    s = scale_values(q.scale, fmt)
    if fmt.name == "int4":
        assert torch.equal(row, (s * 7).amax(-1, keepdim=True) / 448)


def test_global_scale_of_a_quantized_tensor_counts() -> None:
    x = torch.randn(5, 64)
    fmt = get_format("nvfp4")
    q = quantize(x, fmt, global_scale=nvfp4_global_scale(x.abs().amax()))
    lost = dequantize(Quantized(q.codes, q.scale, None), fmt)
    assert (lost - x).square().mean() > 100 * (dequantize(q, fmt) - x).square().mean()
    assert torch.equal(element_values(q.codes, fmt).abs().amax(), torch.tensor(6.0))


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("seed", [1, 2])
def test_nearest_is_quantize_and_dequantize(name: str, seed: int) -> None:
    fmt = get_format(name)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 256, generator=g) * torch.randn(40, 256, generator=g).exp()
    x[0], x[1], x[2, 7], x[3, 9] = 0.0, 1e-38, torch.nan, torch.inf
    clip = torch.tensor(0.8)
    whole = torch.tensor(0.003) if fmt.two_level else None
    q = quantize(x, fmt, global_scale=whole, clip=clip)
    scale = group_scales(x, fmt, whole, clip)
    values = at_scales(x, scale, fmt, whole)
    torch.testing.assert_close(values, dequantize(q, fmt), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(scale.view(torch.uint8), q.scale.view(torch.uint8))
