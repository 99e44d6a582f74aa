"""Packing is a bijection, in the documented byte layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pq_fx.errors import FormatError
from pq_fx.kernels.formats import Format, get_format
from pq_fx.kernels.pack import channels_of, pack, unpack
from pq_fx.kernels.reference import element_values, quantize
from pq_fx.kernels.values import packed_values

KEYS = (
    "int4:64:bf16",
    "int3:64:bf16",
    "int4f:64:bf16",
    "int3f:64:bf16",
    "nvfp4:16:e4m3",
    "mxfp4:32:e8m0",
    "fp8:0:fp32",
    "int8:0:fp32",
)


def random_codes(fmt: Format, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << fmt.bits, shape, generator=generator, dtype=torch.uint8)


def naive_pack(row: list[int], bits: int) -> list[int]:
    """The layout of the module's docstring, one bit at a time."""
    if bits == 8:
        return row
    if bits == 4:
        return [row[i] + 16 * row[i + 1] for i in range(0, len(row), 2)]
    magnitudes = [0] * (len(row) // 4)
    signs = [0] * (len(row) // 8)
    for channel, code in enumerate(row):
        magnitudes[channel // 4] += (code % 4) << (2 * (channel % 4))
        signs[channel // 8] += (code // 4) << (channel % 8)
    return magnitudes + signs


@settings(deadline=None, max_examples=40)
@given(
    key=st.sampled_from(KEYS),
    lead=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    octets=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_pack_is_a_bijection(key: str, lead: list[int], octets: int, seed: int) -> None:
    fmt = Format.parse(key)
    channels = 8 * octets
    codes = random_codes(fmt, (*lead, channels), seed)
    packed = pack(codes, fmt)
    assert packed.shape == (*lead, channels * fmt.bits // 8)
    assert packed.dtype == torch.uint8
    assert channels_of(packed, fmt) == channels
    assert torch.equal(unpack(packed, fmt, channels), codes)
    # Onto: any bytes are the packing of something.
    other = random_codes(get_format("int8"), tuple(packed.shape), seed + 1)
    assert torch.equal(pack(unpack(other, fmt, channels), fmt), other)


@pytest.mark.parametrize("key", KEYS)
def test_layout_against_a_loop(key: str) -> None:
    fmt = Format.parse(key)
    codes = random_codes(fmt, (3, 56), 1)
    expected = torch.tensor(
        [naive_pack(row, fmt.bits) for row in codes.tolist()], dtype=torch.uint8
    )
    assert torch.equal(pack(codes, fmt), expected)


@pytest.mark.parametrize("key", KEYS)
def test_non_contiguous_codes(key: str) -> None:
    fmt = Format.parse(key)
    codes = random_codes(fmt, (48, 5), 2).t()
    assert not codes.is_contiguous()
    assert torch.equal(unpack(pack(codes, fmt), fmt, 48), codes)


@pytest.mark.parametrize("key", KEYS)
def test_values_of_packed_rows_are_those_of_their_codes(key: str) -> None:
    fmt = Format.parse(key)
    codes = random_codes(fmt, (37, 64), 3)
    values = packed_values(pack(codes, fmt), fmt, 64)
    # Bytes of e4m3 hold NaN too; compare the bits, so that negative zeros count.
    assert torch.equal(values.view(torch.int32), element_values(codes, fmt).view(torch.int32))


def test_one_changed_channel_changes_its_bits_only() -> None:
    fmt = get_format("int3")
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 13] = 7
    packed = pack(codes, fmt)
    assert packed.nonzero().tolist() == [[0, 3], [0, 17]]  # byte 13 // 4; byte 16 + 13 // 8
    assert packed[0, 3] == 3 << 2
    assert packed[0, 17] == 1 << 5


def test_int3_is_at_most_3_3_bits_a_weight_with_its_scales() -> None:
    fmt = get_format("int3", 64)
    weight = torch.randn(320, 256)
    q = quantize(weight, fmt)
    packed = pack(q.codes, fmt)
    stored = packed.numel() * packed.element_size() + q.scale.numel() * q.scale.element_size()
    assert 8 * stored / weight.numel() <= 3.3
    assert 8 * stored / weight.numel() == fmt.bits_per_weight


def test_layout_differs_between_formats_and_must_not_be_mixed_up() -> None:
    codes = random_codes(get_format("int3"), (4, 64), 4)
    packed = pack(codes, get_format("int3"))
    with pytest.raises(
        FormatError, match="64 channels of int4:64:bf16 take 32 bytes a row, found 24"
    ):
        unpack(packed, get_format("int4"), 64)
    swapped = (packed >> 4) | (packed << 4)
    assert not torch.equal(unpack(swapped, get_format("int3"), 64), codes)


def test_errors_name_what_was_found() -> None:
    with pytest.raises(FormatError, match=r"torch.int32.*quantize"):
        pack(torch.zeros(2, 8, dtype=torch.int32), get_format("int4"))
    with pytest.raises(FormatError, match="K=12 .* multiple of 8"):
        pack(torch.zeros(2, 12, dtype=torch.uint8), get_format("int3"))
    with pytest.raises(FormatError, match="K=7 .* multiple of 2"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), get_format("int4"), 7)
    with pytest.raises(FormatError, match="torch.float32"):
        unpack(torch.zeros(2, 4), get_format("int4"), 8)
