from __future__ import annotations

import json

import pytest

from pq_fx.config import METHODS, PRESETS, QuantConfig
from pq_fx.errors import ConfigError


def test_defaults_are_the_papers_hardest_useful_case():
    config = QuantConfig()
    assert config.weight.key == config.activation.key == "int4:64:bf16"
    assert config.weight_only.key == "int4:64:bf16"
    assert config.sort and config.rotate


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("w4a4", "int4:64:bf16", "int4:64:bf16"),
        ("w4a4-int4", "int4:64:bf16", "int4:64:bf16"),
        ("w4a4-nvfp4", "nvfp4:16:e4m3", "nvfp4:16:e4m3"),
        ("w4a4-mxfp4", "mxfp4:32:e8m0", "mxfp4:32:e8m0"),
        ("w3a3-int3", "int3:64:bf16", "int3:64:bf16"),
        ("w4a8", "int4:64:bf16", "fp8:0:fp32"),
        ("w4a8-int4", "int4:64:bf16", "fp8:0:fp32"),
        ("w4a16-int4", "int4:64:bf16", None),
    ],
)
def test_presets(name, weight, activation):
    config = QuantConfig.preset(name)
    assert config.weight.key == weight
    assert (config.activation and config.activation.key) == activation
    assert QuantConfig.of(name) == config


def test_every_preset_is_in_the_table_above():
    assert len(PRESETS) == 8


@pytest.mark.parametrize(
    ("method", "sort", "rotate"),
    [
        ("rtn", False, False),
        ("smoothquant", False, False),
        ("svdquant", False, False),
        ("convrot", False, True),
        ("permuquant", True, False),
        ("permuquant-h", True, True),
        ("best", True, True),
    ],
)
def test_methods(method, sort, rotate):
    config = QuantConfig(method=method)
    assert (config.sort, config.rotate) == (sort, rotate)
    assert len(METHODS) == 7


def test_a_format_key_sets_group_and_scale():
    config = QuantConfig("int4:128:pow2")
    assert (config.format, config.group_size, config.scale) == ("int4", 128, "pow2")
    assert config.activation.key == "int4:128:pow2"
    assert QuantConfig("int4", group_size=128, scale="pow2") == config


def test_same_with_another_activation_group():
    config = QuantConfig("int4", group_size=64, activation_group_size=32)
    assert config.weight.key == "int4:64:bf16"
    assert config.activation.key == "int4:32:bf16"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": "int5"}, "int5.*int4, int3, int4f"),
        ({"format": None}, "format is None"),
        ({"group_size": 48}, "48.*known: 16, 32, 64, 128"),
        ({"group_size": True}, "expected an integer"),
        ({"group_size": 64.0}, "expected an integer"),
        ({"format": "nvfp4", "group_size": 64}, "nvfp4 has no group size 64"),
        ({"scale": "fp16"}, "fp16.*bf16, pow2"),
        ({"format": "int4:64"}, "name:group_size:scale"),
        ({"format": "int4:64:bf16", "group_size": 32}, "contradicts group_size=32"),
        ({"activation_format": "int2"}, "activation_format.*int2"),
        ({"activation_format": None, "activation_group_size": 32}, "needs an activation_format"),
        ({"activation_format": "fp8:0:fp32", "activation_group_size": 32}, "contradicts"),
        ({"weight_only_format": None}, "weight_only_format is None"),
        ({"method": "gptq"}, "gptq.*rtn, smoothquant, svdquant, convrot"),
        ({"alphas": ()}, "at least one value"),
        ({"alphas": (0.5, 1.5)}, r"1\.5.*from 0 to 1"),
        ({"alphas": (float("nan"),)}, "nan"),
        ({"alphas": 0.5}, "list of numbers"),
        ({"alphas": "0.5"}, "list of numbers"),
        ({"tau": -1.1}, "tau is -1.1"),
        ({"tau": float("inf")}, "tau is inf"),
        ({"gather_margin": 2}, "gather_margin is 2"),
        ({"calibration_rows": 1}, "at least 2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"modules_to_not_convert": [""]}, "list of module names"),
        ({"modules_to_not_convert": 3}, "list of module names"),
        ({"rules": 5}, "expected a dict"),
        ({"rules": {"": None}}, "layer name"),
        ({"rules": {"re:(": None}}, "not a regex"),
        ({"rules": {"a": 4}}, r"rules\['a'\] is int"),
        ({"rules": {"a": "int5"}}, r"rules\['a'\].*int5"),
        ({"rules": {"a": {"formt": "int4"}}}, r"formt.*known: format, group_size"),
        ({"rules": {"a": {"rules": {}}}}, "unknown settings 'rules'"),
        ({"rules": {"a": {"group_size": 24}}}, r"rules\['a'\].*24"),
        ({"rules": [["a", None], ["a", "fp8"]]}, "twice"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        QuantConfig(**settings)


def test_an_empty_alpha_list_is_fine_without_sorting():
    assert QuantConfig(method="rtn", alphas=()).alphas == ()


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="w5a5.*w4a4-int4"):
        QuantConfig.preset("w5a5")
    with pytest.raises(ConfigError, match="neither a preset .*w4a4-nvfp4.* nor a format .*mxfp4"):
        QuantConfig.of("w5a5")
    with pytest.raises(ConfigError, match="'bits'.*known: format"):
        QuantConfig.of({"bits": 4})
    with pytest.raises(ConfigError, match="float"):
        QuantConfig.of(4.0)


def test_of():
    config = QuantConfig("int3")
    assert QuantConfig.of(config) is config
    assert QuantConfig.of("int3") == config == QuantConfig.of({"format": "int3"})
    assert QuantConfig.of(None) == QuantConfig()
    assert QuantConfig.preset("w4a4-nvfp4", seed=3).seed == 3


RULES = {
    "re:blocks.*": "fp8",
    "blocks.0.q": None,
    r"re:blocks\.1\..*": {"format": "int3"},
    "blocks.1.k": {"tau": 0.25, "method": "rtn"},
    "_default": "w4a4-nvfp4",
}


def test_precedence_of_rules():
    config = QuantConfig("int4", group_size=128, seed=5, rules=RULES)
    assert config.for_layer("blocks.0.q") is None  # exact before regex, though it comes later
    assert config.for_layer("blocks.1.v").weight.key == "fp8:0:fp32"  # the first regex that matches
    assert config.for_layer("blocks.1.k").weight.key == "int4:128:bf16"
    assert config.for_layer("blocks.1.k").tau == 0.25
    assert config.for_layer("blocks.1.k").method == "rtn"
    assert config.for_layer("head").weight.key == "nvfp4:16:e4m3"
    assert config.for_layer("head").seed == 5  # what a rule does not name stays
    # A regex has to match the whole name.
    assert config.for_layer("my.blocks.2").weight.name == "nvfp4"
    without_default = QuantConfig("int3", rules={"re:blocks": "fp8"})
    assert without_default.for_layer("blocks.1").weight.name == "int3"


def test_a_rules_format_brings_its_own_group_and_scale():
    config = QuantConfig("int4:128:pow2", activation_group_size=32, rules={"a": "int3"})
    assert config.for_layer("a").weight.key == "int3:64:bf16"
    assert config.for_layer("a").activation.key == "int3:64:bf16"
    assert config.for_layer("b").activation.key == "int4:32:pow2"
    # Activations that do not follow the weights are untouched by a rule on the weights.
    config = QuantConfig(activation_format="fp8", activation_group_size=32, rules={"a": "int3"})
    assert config.for_layer("a").activation.key == "fp8:32:fp32"


def test_a_config_as_a_rule():
    config = QuantConfig(rules={"a": QuantConfig("nvfp4", method="rtn")})
    assert config.for_layer("a").weight.name == "nvfp4"
    assert config.for_layer("a").method == "rtn"
    with pytest.raises(ConfigError, match="cannot have rules"):
        QuantConfig(rules={"a": config})


def test_a_layers_settings_have_no_rules():
    config = QuantConfig(rules={"a": "fp8"}, modules_to_not_convert=["z"])
    assert config.for_layer("a").rules is config.for_layer("b").rules is None
    assert config.for_layer("b").modules_to_not_convert == ()


def test_the_skip_list_follows_diffusers():
    """TorchAoHfQuantizer: ``key + "." in name or key == name`` with the parameter's name."""
    config = QuantConfig(modules_to_not_convert=["proj_out", "blocks.1"], rules={"proj_out": "fp8"})
    assert config.for_layer("proj_out") is None  # before the rule
    assert config.for_layer("blocks.1.to_q") is None
    assert config.for_layer("blocks.0.proj_out") is None
    assert config.for_layer("blocks.10.to_q") is not None
    assert config.for_layer("proj_outer") is not None
    assert QuantConfig(modules_to_not_convert="head").modules_to_not_convert == ("head",)
    assert QuantConfig(modules_to_not_convert=None).modules_to_not_convert == ()


def test_rules_that_match_nothing_are_found():
    config = QuantConfig(rules=RULES, modules_to_not_convert=["no_such_module"])
    assert config.unmatched(["blocks.0.q", "head"]) == [
        "re:blocks.*",
        r"re:blocks\.1\..*",
        "blocks.1.k",
    ]
    # The second regex never decides: the first takes all of its layers.
    names = ["blocks.0.q", "blocks.1.k", "blocks.1.v"]
    assert config.unmatched(names) == [r"re:blocks\.1\..*"]


def test_json_round_trip_keeps_the_order_of_rules():
    config = QuantConfig(
        "int3", alphas=[0.5], rules=RULES, modules_to_not_convert=["head"], tau=0.1
    )
    text = json.dumps(config.to_dict(), sort_keys=True)  # as diffusers writes it
    assert QuantConfig.from_dict(json.loads(text)) == config
    assert list(QuantConfig.from_dict(json.loads(text)).rules) == list(RULES)


def test_a_config_cannot_be_changed_by_what_it_was_made_of():
    mine = {"a": {"format": "fp8"}}
    config = QuantConfig(rules=mine)
    mine["a"]["format"] = "int3"
    mine["b"] = None
    assert config.rules == {"a": {"format": "fp8"}}
    config.to_dict()["rules"][0][1]["format"] = "int3"
    assert config.for_layer("a").weight.name == "fp8"


def test_configs_compare_and_hash():
    assert QuantConfig(alphas=[0, 1]) == QuantConfig(alphas=(0.0, 1.0))
    assert hash(QuantConfig(rules={"a": None})) == hash(QuantConfig(rules={"a": None}))
    assert QuantConfig(rules={"a": None}) != QuantConfig(rules={"b": None})


@pytest.mark.parametrize(
    ("settings", "weight", "activation", "weight_only"),
    [
        ({}, "int4f:64:bf16", "int4f:64:bf16", "int4f:64:bf16"),
        ({"format": "int3", "group_size": 32}, "int3f:32:bf16", "int3f:32:bf16", "int4f:64:bf16"),
        ({"activation_format": "fp8"}, "int4f:64:bf16", "fp8:0:fp32", "int4f:64:bf16"),
        ({"activation_format": "int4:32:bf16"}, "int4f:64:bf16", "int4f:32:bf16", "int4f:64:bf16"),
        ({"scale": "pow2"}, "int4:64:pow2", "int4:64:pow2", "int4f:64:bf16"),
        ({"format": "nvfp4"}, "nvfp4:16:e4m3", "nvfp4:16:4over6", "int4f:64:bf16"),
        ({"activation_format": "nvfp4"}, "int4f:64:bf16", "nvfp4:16:4over6", "int4f:64:bf16"),
        (
            {"format": "nvfp4", "parts": {"four_over_six": False}},
            "nvfp4:16:e4m3",
            "nvfp4:16:e4m3",
            "int4f:64:bf16",
        ),
        (
            {"method": "rtn", "format": "nvfp4:16:4over6"},
            "nvfp4:16:4over6",
            "nvfp4:16:4over6",
            "int4:64:bf16",
        ),
        ({"weight_only_format": "int8"}, "int4f:64:bf16", "int4f:64:bf16", "int8:0:fp32"),
        ({"parts": {"full_range": False}}, "int4:64:bf16", "int4:64:bf16", "int4:64:bf16"),
        ({"method": "rtn"}, "int4:64:bf16", "int4:64:bf16", "int4:64:bf16"),
        ({"method": "rtn", "format": "int4f"}, "int4f:64:bf16", "int4f:64:bf16", "int4:64:bf16"),
    ],
)
def test_ranges_and_rules_of_scales_are_parts(settings, weight, activation, weight_only):
    config = QuantConfig(**({"method": "best"} | settings))
    assert config.weight.key == weight
    assert config.activation.key == activation
    assert config.weight_only.key == weight_only
    assert config.for_layer("any").weight.key == weight
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_rules_method_decides_the_range_of_its_layer():
    config = QuantConfig("int4", method="rtn", rules={"a": {"method": "best"}, "b": "int3"})
    assert config.for_layer("a").weight.name == config.for_layer("a").activation.name == "int4f"
    assert config.for_layer("b").weight.name == "int3" and config.weight.name == "int4"


def test_parts_change_a_methods_row():
    config = QuantConfig(method="best", parts={"clip": False, "refine": 3})
    assert config.recipe.compensate and not config.recipe.clip and config.recipe.refine == 3
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for parts, words in (
        ({"clap": True}, "unknown part 'clap'"),
        ({"clip": 1}, "True or False"),
        ({"refine": -1}, "integer of at least 0"),
        ({"refine": True}, "integer of at least 0"),
        ("clip", "expected a dict"),
    ):
        with pytest.raises(ConfigError, match=words):
            QuantConfig(method="best", parts=parts)
    with pytest.raises(ConfigError, match="budget_bits"):
        QuantConfig(budget_bits=2.0)
