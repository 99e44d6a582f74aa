"""Checks and conversions of single settings, for `QuantConfig`; each error names the setting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pq_fx.errors import ConfigError, FormatError
from pq_fx.kernels.formats import FORMAT_NAMES, Format, get_format

SKIP_LIST = "modules_to_not_convert"


def plain_copy(value: Any) -> Any:
    """A deep copy of a rule's value as plain JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain_copy(inner) for key, inner in value.items()}
    return [plain_copy(inner) for inner in value] if isinstance(value, list | tuple) else value


def rule_pairs(rules: Any) -> dict[str, Any]:
    """Rules as `to_dict` writes them, ``[[pattern, value], ...]``, back into a dict."""
    try:
        pairs = [(pattern, value) for pattern, value in rules]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"rules are {type(rules).__name__}; expected a dict or a list of [pattern, value]"
        ) from error
    if len(dict(pairs)) != len(pairs):
        raise ConfigError("rules name one pattern twice")
    return dict(pairs)


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
