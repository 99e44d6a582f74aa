"""Checks and conversions of single settings, for `QuantConfig`; each error names the setting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pq_fx.errors import ConfigError, FormatError
from pq_fx.kernels.formats import FORMAT_NAMES, Format, get_format
from pq_fx.presets import SAME

SKIP_LIST = "modules_to_not_convert"
FULL_RANGE = {"int4": "int4f", "int3": "int3f"}


def named_format(what: str, name: Any, group_size: Any, scale: Any) -> Format:
    """`get_format` with errors that name the setting `what`."""
    if not isinstance(name, str):
        raise ConfigError(f"{what} is {name!r}; expected one of {listed(FORMAT_NAMES)}")
    if group_size is not None:
        integer(f"group size of {what}", group_size, 0)
    try:
        return get_format(name, group_size, scale)
    except FormatError as error:
        raise ConfigError(f"{what}: {error}") from error


def parsed_format(what: str, key: str) -> Format:
    """`Format.parse` with errors that name the setting `what`."""
    try:
        return Format.parse(key)
    except FormatError as error:
        raise ConfigError(f"{what}: {error}") from error


def format_or_key(what: str, name: Any, group_size: int | None) -> Format:
    """The format of a name ("fp8") or of a whole key ("int4:128:pow2"), which has its own group size."""
    if not isinstance(name, str) or ":" not in name:
        return named_format(what, name, group_size, None)
    whole = parsed_format(what, name)
    if group_size is not None and group_size != whole.group_size:
        raise ConfigError(
            f"{what} {name!r} contradicts {what.replace('format', 'group_size')}={group_size!r}; "
            "give one of the two"
        )
    return whole


def activation_format(name: Any, group_size: int | None, weight: Format) -> Format | None:
    """Format of activations beside weights of this format: "same", a name, a key, or None (16 bits)."""
    if name is None:
        if group_size is not None:
            raise ConfigError(
                f"activation_group_size={group_size!r} needs an "
                'activation_format; it is None (16-bit activations). Use "same" or a format.'
            )
        return None
    if name == SAME:
        size = weight.group_size if group_size is None else group_size
        return named_format("activation_format", weight.name, size, weight.scale)
    return format_or_key("activation_format", name, group_size)


def full_range(fmt: Format) -> Format:
    """int4 and int3 as int4f and int3f, which use every code point; other formats as they are, and scales that are
    powers of two."""
    name = FULL_RANGE.get(fmt.name)
    return fmt if name is None or fmt.scale != "bf16" else replace(fmt, name=name)


def four_over_six(fmt: Format) -> Format:
    """nvfp4 with the scale rule "4over6", which suits quantizing at run time; other formats as they are."""
    return replace(fmt, scale="4over6") if fmt.name == "nvfp4" else fmt


def listed(names: Iterable[Any]) -> str:
    """Names in quotes, for messages."""
    return ", ".join(repr(name) for name in names)


def module_names(value: Any) -> tuple[str, ...]:
    """diffusers' skip list as a tuple of names."""
    if value is None:  # diffusers writes None for an empty list
        return ()
    if isinstance(value, str):  # diffusers takes one name, too
        value = (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) and n for n in value):
        raise ConfigError(f"{SKIP_LIST} is {value!r}; expected a list of module names")
    return tuple(value)


def number(what: str, value: Any, low: float, high: float) -> float:
    """A finite number from `low` to `high`, or ConfigError."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ConfigError(f"{what} is {value!r}; expected a number from {low:g} to {high:g}")
    return float(value)


def integer(what: str, value: Any, low: int) -> None:
    """Raise ConfigError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{what} is {value!r}; expected an integer of at least {low}")


def fractions(what: str, value: Any) -> tuple[float, ...]:
    """Numbers from 0 to 1 as a tuple, or ConfigError."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{what} is {value!r}; expected a list of numbers from 0 to 1")
    return tuple(number(f"a value of {what}", inner, 0.0, 1.0) for inner in value)
