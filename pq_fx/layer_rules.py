"""Rules for single layers, the `rules` of a `QuantConfig`: what one may say, and which one decides.

    {"blocks.0.attn.to_q": None, "re:blocks.*ff.*": "int3", "_default": {"group_size": 32}}

torchao's ``FqnToConfig`` has the same order: an exact name, then the first regex, then the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pq_fx.config_values import listed
from pq_fx.errors import ConfigError

DEFAULT_RULE = "_default"
REGEX_PREFIX = "re:"


def deciding_rule(rules: Iterable[str], fqn: str) -> str | None:
    """The pattern that decides for the layer of this fully qualified name, or None."""
    patterns = list(rules)
    if fqn in patterns:
        return fqn
    for pattern in patterns:
        if pattern.startswith(REGEX_PREFIX) and re.fullmatch(pattern[len(REGEX_PREFIX) :], fqn):
            return pattern
    return DEFAULT_RULE if DEFAULT_RULE in patterns else None


def check_pattern(pattern: Any) -> None:
    """Raise ConfigError unless `pattern` is a layer's name or "re:" and a regex that compiles."""
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"rules: {pattern!r} is not a layer name or 're:<regex>'")
    if pattern.startswith(REGEX_PREFIX):
        try:
            re.compile(pattern[len(REGEX_PREFIX) :])
        except re.error as error:
            raise ConfigError(f"rules: {pattern!r} is not a regex: {error}") from error


def plain_rule(pattern: str, value: Any, known: list[str]) -> Any:
    """A rule's value as plain JSON: None, a name, or a dict of some `known` settings, else ConfigError."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"rules[{pattern!r}] is {type(value).__name__}; expected None (leave the layer alone), "
            "a preset or format name, or a dict of fields"
        )
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ConfigError(
            f"rules[{pattern!r}]: unknown settings {listed(unknown)}; known: {', '.join(known)}"
        )
    return plain_copy(value)


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
