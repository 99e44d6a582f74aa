"""What to quantize and how: `QuantConfig`, its presets and its rules for single layers.

Names follow torchao where it has them (rules are its ``FqnToConfig``) and diffusers
(``modules_to_not_convert``), so that a user of either has nothing new to learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from pq_fx.config_values import (
    SKIP_LIST,
    activation_format,
    format_or_key,
    four_over_six,
    fractions,
    full_range,
    integer,
    listed,
    module_names,
    named_format,
    number,
    parsed_format,
)
from pq_fx.errors import ConfigError
from pq_fx.kernels.formats import FORMAT_NAMES, Format
from pq_fx.layer_rules import (
    DEFAULT_RULE,
    check_pattern,
    deciding_rule,
    plain_copy,
    plain_rule,
    rule_pairs,
)
from pq_fx.methods import METHODS, Method, with_parts
from pq_fx.presets import PRESETS, SAME, changes_of_name

# A new format makes the settings of the old one meaningless, so a rule that names a format
# without them starts from that format's defaults.
_FORMAT_FIELDS = ("group_size", "scale")
_ACTIVATION_FIELDS = ("activation_group_size",)
_NOT_IN_RULES = ("rules", SKIP_LIST)


@dataclass(frozen=True)
class QuantConfig:
    """Settings of one quantization. Immutable; every value is checked when it is made.

    Which preset: "w4a4" (int4 weights and activations) runs on every device and is the smallest that
    is fast. On Hopper and Ada take "w4a8": activations in fp8 go through the same fp8 GEMM in the
    same time, with under half the error of W4A4. For numbers that other hardware shares, take
    "w4a4-nvfp4" or "w4a4-mxfp4".

    Attributes:
        format: of the weights: "int4", "int3", "int4f", "int3f", "nvfp4", "mxfp4", "fp8", "int8", or a whole format
            key such as "int4:128:pow2" (which then sets `group_size` and `scale`).
        group_size: contiguous channels that share a scale; None = the format's own default.
        activation_format: "same" as the weights, another format, or None for 16-bit activations.
        activation_group_size: None = the weights' for "same", else that format's default.
        scale: "bf16" or "pow2" scales of int4 and int3, "e4m3" or "4over6" of nvfp4; None = the format's default.
        method: "rtn" (round to nearest), "smoothquant", "svdquant" (smoothing and a 16-bit branch
            of rank 32), "convrot" (rotation only), "permuquant" (sort), "permuquant-h" (sort, then
            rotation), "best" (permuquant-h with refined orders, clipped activations, weights
            rounded with error compensation and searched scales, int4 and int3 as int4f and int3f,
            activations in nvfp4 with "4over6" scales: dearer to convert; at run time the same
            kernels, of which those that quantize to nvfp4 take longer). pq_fx/methods.py has the table.
        parts: entries of the method's row to change, e.g. ``{"clip": False}``.
        budget_bits: average bits a weight may take, scales included; layers then get int3, int4 or
            int8 weights by their measured sensitivity (`format` is what a layer starts from).
        weight_only_format: of linears that see one row a sample (timestep, modulation, pooled
            text): they are limited by reading weights, so their input stays in 16 bits.
        rules: settings of single layers: ``{"exact.name" | "re:regex" | "_default": value}``, value
            None (leave the layer alone), a preset or format name, or a dict of the fields to
            change. An exact name goes before a regex (the first that matches the whole name),
            a regex before "_default".
        modules_to_not_convert: diffusers' skip list: a layer is left alone when ``key + "."``
            occurs in ``name + "."``. It goes before every rule.
        alphas: exponents tried for the sort key ``mu2_a**alpha * mu2_w**(1 - alpha)``.
        tau: a permutation is kept when it lowers the error on held-out rows by more than this
            fraction of the error without it; -1 keeps whatever was best on the rows for fitting.
        gather_margin: the same for a permutation that cannot be folded and has to be gathered on
            chip: it must win by this fraction more; 1 allows none.
        alike_blocks: what plays one role in several blocks is rotated alike (the blocks vote), and
            has an order, a clip or a smoothing in all of them or in none, so that
            `compile_repeated_blocks` compiles a block once and not once for each mixture.
        calibration_rows: rows (tokens) of each linear's input that calibration keeps. With "best" 4096 of a few hundred
            prompts are worth their memory (docs/measurements.md).
        seed: of the choice of those rows; equal seeds and calls give equal results.

    Raises:
        ConfigError: a value is unknown, out of range or contradicts another one.
    """

    format: str = "int4"
    group_size: int | None = None
    activation_format: str | None = SAME
    activation_group_size: int | None = None
    scale: str | None = None
    method: str = "permuquant-h"
    parts: Mapping[str, Any] | None = field(default=None, hash=False)
    budget_bits: float | None = None
    weight_only_format: str = "int4"
    rules: Mapping[str, Any] | None = field(default=None, hash=False)
    modules_to_not_convert: tuple[str, ...] = ()
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    tau: float = 0.0
    gather_margin: float = 0.05
    alike_blocks: bool = True
    calibration_rows: int = 1024
    seed: int = 0

    methods: ClassVar[Mapping[str, Method]] = METHODS

    def __post_init__(self) -> None:
        _ = self.recipe
        if self.parts is not None:
            self._set("parts", dict(self.parts))
        self._spread_format_key()
        _ = self.weight, self.activation, self.weight_only  # raise here, not at the first use
        self._set("alphas", fractions("alphas", self.alphas))
        if self.sort and not self.alphas:
            raise ConfigError(
                f"method {self.method!r} sorts channels and needs at least one value in `alphas`"
            )
        number("tau", self.tau, -1.0, 1.0)
        number("gather_margin", self.gather_margin, 0.0, 1.0)
        if not isinstance(self.alike_blocks, bool):
            raise ConfigError(f"alike_blocks is {self.alike_blocks!r}; expected True or False")
        integer("calibration_rows", self.calibration_rows, 2)  # one to fit on, one to accept on
        integer("seed", self.seed, 0)
        if self.budget_bits is not None:
            number("budget_bits", self.budget_bits, 3.0, 16.0)
        self._set("modules_to_not_convert", module_names(self.modules_to_not_convert))
        if self.rules is not None:
            self._set("rules", self._checked_rules(self.rules))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way to normalise a field of a frozen dataclass

    # Formats ------------------------------------------------------------------------------------

    def _spread_format_key(self) -> None:
        if not isinstance(self.format, str):
            raise ConfigError(f"format is {self.format!r}; expected one of {listed(FORMAT_NAMES)}")
        if ":" not in self.format:
            return
        whole = parsed_format("format", self.format)
        for name, inside in (("group_size", whole.group_size), ("scale", whole.scale)):
            given = getattr(self, name)
            if given is not None and given != inside:
                raise ConfigError(
                    f"format {self.format!r} contradicts {name}={given!r}; give one of the two"
                )
            self._set(name, inside)
        self._set("format", whole.name)

    def ranged(self, fmt: Format) -> Format:
        """The format in the range that the method's row asks for."""
        return full_range(fmt) if self.recipe.full_range else fmt

    @property
    def weight(self) -> Format:
        """Format of the weights."""
        return self.ranged(named_format("format", self.format, self.group_size, self.scale))

    @property
    def activation(self) -> Format | None:
        """Format of the activations, or None when they stay in 16 bits."""
        found = activation_format(self.activation_format, self.activation_group_size, self.weight)
        if found is None:
            return None
        found = self.ranged(found)
        return four_over_six(found) if self.recipe.four_over_six else found

    @property
    def weight_only(self) -> Format:
        """Weight format of linears that see one row a sample; their input stays in 16 bits."""
        return self.ranged(format_or_key("weight_only_format", self.weight_only_format, None))

    @property
    def recipe(self) -> Method:
        """The method's row with `parts` changed."""
        return with_parts(self.method, self.parts)

    @property
    def sort(self) -> bool:
        """Whether the method reorders channels."""
        return self.recipe.sort

    @property
    def rotate(self) -> bool:
        """Whether the method rotates the channels of each group."""
        return self.recipe.rotate

    # Rules --------------------------------------------------------------------------------------

    def _checked_rules(self, rules: Any) -> dict[str, Any]:
        if not isinstance(rules, Mapping):
            rules = rule_pairs(rules)
        checked = {}
        for pattern, value in rules.items():
            check_pattern(pattern)
            checked[pattern] = _plain_rule(pattern, value)
            if value is not None:
                try:
                    self._with_rule(checked[pattern])
                except ConfigError as error:
                    raise ConfigError(f"rules[{pattern!r}]: {error}") from error
        return checked

    def _with_rule(self, value: str | Mapping[str, Any]) -> QuantConfig:
        """These settings with one rule's changes, without rules of their own."""
        changes = changes_of_name(value) if isinstance(value, str) else dict(value)
        if "format" in changes:
            changes = dict.fromkeys(_FORMAT_FIELDS) | changes
        if "activation_format" in changes or ("format" in changes and self._follows_weight):
            changes = dict.fromkeys(_ACTIVATION_FIELDS) | changes
        return replace(self, rules=None, modules_to_not_convert=(), **changes)

    @property
    def _follows_weight(self) -> bool:
        return self.activation_format == SAME

    def is_skipped(self, fqn: str) -> bool:
        """Whether `modules_to_not_convert` names this layer (diffusers' substring rule)."""
        return any(key + "." in fqn + "." for key in self.modules_to_not_convert)

    def rule_for(self, fqn: str) -> str | None:
        """The key of the rule that decides for this layer, or None when none does."""
        return deciding_rule(self.rules or {}, fqn)

    def for_layer(self, fqn: str) -> QuantConfig | None:
        """Settings of the layer with this fully qualified name, or None to leave it alone."""
        if self.is_skipped(fqn):
            return None
        rule = self.rule_for(fqn)
        if rule is None:
            return replace(self, rules=None, modules_to_not_convert=())
        assert self.rules is not None
        value = self.rules[rule]
        return None if value is None else self._with_rule(value)

    def unmatched(self, fqns: Iterable[str]) -> list[str]:
        """Rules that decide for none of these layers: likely misspelled.

        Skip-list entries are not among them: users pass one list for several models.
        """
        names = list(fqns)
        used = {self.rule_for(fqn) for fqn in names if not self.is_skipped(fqn)}
        return [rule for rule in self.rules or () if rule not in used and rule != DEFAULT_RULE]

    # Making and storing -------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **changes: Any) -> QuantConfig:
        """A named preset, with fields changed: ``QuantConfig.preset("w4a4-nvfp4", seed=1)``."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | changes)

    @classmethod
    def of(cls, value: QuantConfig | str | Mapping[str, Any] | None) -> QuantConfig:
        """A config out of a config, a preset name, a format name, a dict of fields, or None."""
        if value is None:
            return cls()
        if isinstance(value, QuantConfig):
            return value
        if isinstance(value, str):
            return cls(**changes_of_name(value))
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise ConfigError(
            f"cannot make a QuantConfig of {type(value).__name__}; expected a QuantConfig, "
            "a preset name, a format name or a dict"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON. Rules become a list of pairs, whose order survives sorted JSON keys."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["alphas"] = list(self.alphas)
        plain["modules_to_not_convert"] = list(self.modules_to_not_convert)
        plain["parts"] = None if self.parts is None else dict(self.parts)
        if self.rules is not None:
            plain["rules"] = [[pattern, plain_copy(value)] for pattern, value in self.rules.items()]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> QuantConfig:
        """The inverse of `to_dict`; also takes a dict of some of the fields.

        Raises:
            ConfigError: a key is no field, or a value is wrong.
        """
        known = [f.name for f in fields(cls)]
        unknown = [key for key in plain if key not in known]
        if unknown:
            raise ConfigError(f"unknown settings {listed(unknown)}; known: {', '.join(known)}")
        return cls(**plain)


def _plain_rule(pattern: str, value: Any) -> Any:
    if isinstance(value, QuantConfig):
        if value.rules or value.modules_to_not_convert:
            raise ConfigError(f"rules[{pattern!r}]: the config of a rule cannot have rules")
        value = {k: v for k, v in value.to_dict().items() if k not in _NOT_IN_RULES}
    return plain_rule(
        pattern, value, [f.name for f in fields(QuantConfig) if f.name not in _NOT_IN_RULES]
    )
