"""What is done with one linear, given what the graph showed, the settings and the module: quantize, or why not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from pq_fx.config import QuantConfig
from pq_fx.kernels.formats import Format
from pq_fx.plan import LinearFact


@dataclass(frozen=True)
class Decision:
    """Formats of a linear's weight and input (None: 16 bits), or the reason why it is skipped.

    `config` holds the linear's own settings, with its rule applied; None where it is skipped.
    """

    weight: Format | None = None
    activation: Format | None = None
    config: QuantConfig | None = None
    skip_reason: str = ""


def decide(fact: LinearFact, config: QuantConfig, module: nn.Module | None) -> Decision:
    """Decide about the linear `fact.fqn`, whose module in the model is `module`."""
    own, rule = config.for_layer(fact.fqn), config.rule_for(fact.fqn)
    if fact.treatment == "impossible":
        return Decision(skip_reason=fact.reason)
    if own is None:
        listed = config.is_skipped(fact.fqn)
        by = "modules_to_not_convert" if listed else f"rule {rule!r}"
        return Decision(skip_reason=f"left alone by {by}")
    if fact.treatment == "leave" and (rule is None or rule == "_default"):
        return Decision(skip_reason=fact.reason)
    if type(module) is not nn.Linear:
        found = "no module of that name" if module is None else type(module).__name__
        return Decision(skip_reason=f"expected nn.Linear, found {found}")
    one_row = fact.treatment == "weight_only"
    weight = _fitting(own.weight_only if one_row else own.weight, fact.in_features)
    activation = None if one_row else own.activation
    activation = activation and _fitting(activation, fact.in_features)
    reason = _misfit(fact.in_features, weight, activation)
    return Decision(skip_reason=reason) if reason else Decision(weight, activation, own)


def _fitting(fmt: Format, channels: int) -> Format:
    """The format with the largest group, of the given one and smaller, that divides the channels.

    SANA's 5600 hidden channels hold no whole groups of 64; groups of 32 cost a little more for scales and lose no
    accuracy. The report shows the format that was taken. Formats with one group size stay as they are.
    """
    for size in sorted(fmt.group_sizes, reverse=True):
        if 0 < size <= fmt.group_size and channels % size == 0:
            return replace(fmt, group_size=size)
    return fmt


def _misfit(channels: int, weight: Format, activation: Format | None) -> str:
    """Why a linear's input channels do not fit its formats, or nothing."""
    for fmt in (weight, activation):
        if fmt is not None and fmt.group_size and channels % fmt.group_size:
            return f"{channels} input channels are not a multiple of the group of {fmt.key}"
    if channels * weight.bits % 8:
        return f"{channels} input channels do not fill whole bytes in {weight.key}"
    return ""
