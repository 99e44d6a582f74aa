"""The methods as one table: what each does to a linear's input channels and to its weights.

All go through the same passes; a method is a row, and `QuantConfig.parts` changes single entries
of it, so that every part can be measured by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pq_fx.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """One row. Only `smooth` (where its scales cannot be folded) and `low_rank` cost time at run time
    beyond the kernels of PermuQuant-H.

    Attributes:
        sort: reorder channels by the joint second moment (PermuQuant, section 4.1).
        rotate: block-Hadamard rotation inside each group (the paper's "-H").
        half_rotate: try blocks of half a group too.
        refine: swaps between groups that are tried on top of the best order (passes/refine.py). Not part of
            "best": lower layer errors, but not the velocity's, for gathers at run time.
        clip: a constant that each point's scales are made smaller (or larger) by.
        compensate: weights rounded so that errors cancel on the sampled rows (GPTQ).
        search: weight scales searched.
        correct_bias: the mean output error on the sampled rows goes into the linear's bias.
        center: the means of a tensor's channels are taken off where its producer's bias does it (passes/balance.py).
        full_range: int4 and int3 become int4f and int3f: all 16 (8) levels, by scales that have a sign.
        four_over_six: nvfp4 activations take each group's scale from amax / 6 or amax / 4, whichever has less error.
        balance: channels of a tensor and of its weights made alike in size, where the producer takes the scale.
        smooth: move magnitude from activations to weights (SmoothQuant, arXiv 2211.10438); excludes center, balance.
        low_rank: rank of a 16-bit branch beside the quantized weight (SVDQuant, arXiv 2411.05007).
    """

    sort: bool = False
    rotate: bool = False
    half_rotate: bool = False
    refine: int = 0
    clip: bool = False
    compensate: bool = False
    search: bool = False
    correct_bias: bool = False
    center: bool = False
    balance: bool = False
    full_range: bool = False
    four_over_six: bool = False
    smooth: bool = False
    low_rank: int = 0

    @property
    def fits_data(self) -> bool:
        """Whether any part is fitted to activations; rounding, rotation, searched weight scales and ranges are not."""
        return (
            self.sort
            or self.clip
            or self.compensate
            or self.correct_bias
            or self.center
            or self.balance
            or self.smooth
            or self.refine > 0
            or self.low_rank > 0
        )


METHODS: dict[str, Method] = {
    "rtn": Method(),
    "smoothquant": Method(smooth=True),
    "svdquant": Method(smooth=True, low_rank=32),
    "convrot": Method(rotate=True),
    "permuquant": Method(sort=True),
    "permuquant-h": Method(sort=True, rotate=True),
    "best": Method(
        sort=True,
        rotate=True,
        half_rotate=True,
        clip=True,
        compensate=True,
        search=True,
        correct_bias=True,
        center=True,
        balance=True,
        full_range=True,
        four_over_six=True,
    ),
}


def with_parts(name: str, parts: Mapping[str, Any] | None) -> Method:
    """The row of `name` with entries changed. Raises ConfigError for unknown names or values."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    method = METHODS[name]
    if parts is None:
        return method
    if not isinstance(parts, Mapping):
        raise ConfigError(f"parts is {parts!r}; expected a dict such as {{'clip': False}}")
    known = {f.name: type(getattr(method, f.name)) for f in fields(Method)}
    for key, value in parts.items():
        if key not in known:
            raise ConfigError(f"parts: unknown part {key!r}; known: {', '.join(known)}")
        if type(value) is not known[key] or (known[key] is int and value < 0):
            wanted = "True or False" if known[key] is bool else "an integer of at least 0"
            raise ConfigError(f"parts[{key!r}] is {value!r}; expected {wanted}")
    return replace(method, **parts)


def parts_on(method: Method) -> dict[str, Any]:
    """The parts that a row has on. The name of a method may stand for others in another release."""
    return {name: value for name, value in asdict(method).items() if value}


def parts_between(method: Method, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The `parts` that turn a row into the one of which `wanted`, and nothing else, is on."""
    if not isinstance(wanted, Mapping):
        raise ConfigError(f"the parts of a method are {wanted!r:.80}; expected a table")
    have, want = asdict(method), {**asdict(Method()), **wanted}
    return {name: value for name, value in want.items() if have.get(name) != value}
