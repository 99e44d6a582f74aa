"""Keys, defaults, sizes and errors of the number formats."""

from __future__ import annotations

import itertools

import pytest

from pq_fx.errors import FormatError
from pq_fx.kernels.formats import FORMAT_NAMES, Format, get_format

# The whole table, written out again: name -> (element, bits, max value, groups, scales).
TABLE = {
    "int4": ("int4", 4, 7, (16, 32, 64, 128), ("bf16", "pow2")),
    "int3": ("int3", 3, 3, (16, 32, 64, 128), ("bf16", "pow2")),
    "int4f": ("int4f", 4, 8, (16, 32, 64, 128), ("bf16",)),
    "int3f": ("int3f", 3, 4, (16, 32, 64, 128), ("bf16",)),
    "nvfp4": ("e2m1", 4, 6, (16,), ("e4m3", "4over6")),
    "mxfp4": ("e2m1", 4, 6, (32,), ("e8m0",)),
    "fp8": ("e4m3", 8, 448, (0, 16, 32, 64, 128), ("fp32",)),
    "int8": ("int8", 8, 127, (0, 16, 32, 64, 128), ("fp32",)),
}
ALL = [
    Format(name, group, scale)
    for name, (_, _, _, groups, scales) in TABLE.items()
    for group, scale in itertools.product(groups, scales)
]


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.key)
def test_key_is_read_back_and_table_holds(fmt: Format) -> None:
    assert Format.parse(fmt.key) == fmt
    assert fmt.key == f"{fmt.name}:{fmt.group_size}:{fmt.scale}"
    element, bits, max_value, _, _ = TABLE[fmt.name]
    assert (fmt.element, fmt.bits, fmt.max_value) == (element, bits, max_value)
    assert fmt.max_value * fmt.operand_gain <= 448 < fmt.max_value * fmt.operand_gain * 2
    assert fmt.two_level == (fmt.name == "nvfp4")


def test_names_and_defaults() -> None:
    assert set(FORMAT_NAMES) == set(TABLE)
    assert [get_format(n).key for n in TABLE] == [
        "int4:64:bf16",
        "int3:64:bf16",
        "int4f:64:bf16",
        "int3f:64:bf16",
        "nvfp4:16:e4m3",
        "mxfp4:32:e8m0",
        "fp8:0:fp32",
        "int8:0:fp32",
    ]
    assert get_format("int3", 128, "pow2") == Format("int3", 128, "pow2")


def test_every_other_group_and_scale_is_refused() -> None:
    scales = ("bf16", "pow2", "e4m3", "4over6", "e8m0", "fp32", "")
    for name, group, scale in itertools.product(TABLE, (0, 8, 16, 32, 48, 64, 128, 256), scales):
        known = TABLE[name]
        if group in known[3] and scale in known[4]:
            continue
        with pytest.raises(FormatError, match="known: "):
            Format(name, group, scale)


@pytest.mark.parametrize(
    "key",
    ["", "int4", "int4:64", "int4:64:bf16:", "int4:-64:bf16", "int4:sixty:bf16", "int4: 64:bf16"],
)
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(FormatError, match="name:group_size:scale"):
        Format.parse(key)


def test_unknown_name_lists_the_known_ones() -> None:
    for make in (lambda: Format("int5", 64, "bf16"), lambda: get_format("int5")):
        with pytest.raises(
            FormatError, match="'int5'.*int4, int3, int4f, int3f, nvfp4, mxfp4, fp8, int8"
        ):
            make()


@pytest.mark.parametrize(
    ("key", "bits"),
    [
        ("int4:64:bf16", 4.25),
        ("int4:16:bf16", 5.0),
        ("int3:64:bf16", 3.25),
        ("int3:128:pow2", 3.125),
        ("nvfp4:16:e4m3", 4.5),
        ("nvfp4:16:4over6", 4.5),
        ("mxfp4:32:e8m0", 4.25),
        ("fp8:0:fp32", 8.0),
        ("int8:64:fp32", 8.5),
    ],
)
def test_bits_per_weight(key: str, bits: float) -> None:
    assert Format.parse(key).bits_per_weight == bits


def test_channels_that_do_not_fit_name_both_sizes_and_the_way_out() -> None:
    with pytest.raises(
        FormatError, match=r"K=96 .* group of 64 of int4:64:bf16; .*\[16, 32\].*rule"
    ):
        get_format("int4").check_channels(96)
    with pytest.raises(FormatError, match="K=40 .* one scale a row"):
        get_format("nvfp4").check_channels(40)
    get_format("fp8").check_channels(7)
    get_format("int4").check_channels(192)


def test_sizes_of_a_row() -> None:
    fmt = get_format("int3", 32)
    assert (fmt.groups(96), fmt.packed_bytes(96)) == (3, 36)
    row = get_format("fp8")
    assert (row.groups(96), row.packed_bytes(96)) == (1, 96)
