from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from pq_fx.config import QuantConfig
from pq_fx.report import LayerReport, Report, ReportError

INT4 = "int4:64:bf16"


def made_up(**changes) -> Report:
    layers = [
        LayerReport("b.q", 256, 128, INT4, INT4, "r0", "norm", 0.5, 64, 0.04, 0.02, True),
        LayerReport("b.k", 256, 64, INT4, INT4, "r0", "norm", 0.5, 64, 0.08, 0.04, True),
        LayerReport("b.o", 128, 256, INT4, INT4, "r1", "fold", None, 0, 0.03, 0.03, False),
        LayerReport("mod", 256, 768, INT4),
        LayerReport("out", 256, 48, skip_reason="final projection: it makes the output"),
    ]
    settings = {"seconds": 1.5, "weight_bytes": 250_000, "float_weight_bytes": 1_000_000}
    return Report(layers, QuantConfig(rules={"re:o.*": None}), **(settings | changes))


def test_sums():
    report = made_up()
    assert [layer.fqn for layer in report.skipped] == ["out"]
    assert len(report.quantized) == 4
    assert report.mean_layer_error == pytest.approx((0.02 + 0.04 + 0.03) / 3)
    assert report.mean_layer_error_before == pytest.approx((0.04 + 0.08 + 0.03) / 3)
    assert (report.regions, report.accepted_regions) == (2, 1)


def test_a_report_of_nothing_has_no_error():
    empty = Report((), QuantConfig())
    assert empty.mean_layer_error == 0.0
    assert (empty.regions, empty.accepted_regions) == (0, 0)
    assert "0 of 0 linears" in str(empty)


def test_json_round_trip():
    report = made_up()
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert report.to_json() == made_up().to_json()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_survive_json(value):
    odd = LayerReport("a", 64, 64, INT4, error_before=value, error_after=value)
    text = Report((odd,), QuantConfig()).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = Report.from_dict(json.loads(text)).layers[0]
    assert str(back.error_before) == str(value)
    assert isinstance(back.error_after, float)


@pytest.mark.parametrize("fmt", ["int4:64:bf16", "int4f:64:bf16", "int4:64:pow2", "nvfp4:16:e4m3"])
def test_an_older_report_says_what_its_settings_meant(fmt):
    """Before full ranges `best` gave int4, and its settings look like those of now."""
    config = QuantConfig(fmt.replace("int4f", "int4"), method="best")
    row = LayerReport("a", 64, 64, format=fmt, activation_format=fmt)
    plain = Report((row,), config).to_dict()
    del plain["recipe"]
    loaded = Report.from_dict(plain)
    assert loaded.layers == (row,)
    old = fmt == "int4:64:bf16"
    assert loaded.config.recipe.full_range != old and not loaded.config.recipe.four_over_six
    assert loaded.config.weight.key == loaded.config.activation.key == fmt
    parts = {"four_over_six": False, **({"full_range": False} if old else {})}
    assert loaded.config == replace(config, parts=parts)


def test_a_report_names_the_parts_of_its_method():
    """So that a method which does more in a later release, or less, is what it was when it converted."""
    config = QuantConfig("int4", method="best", parts={"clip": False})
    row = LayerReport("a", 64, 64, format="int4:64:bf16")  # a rule's; says nothing of full ranges
    plain = Report((row,), config).to_dict()
    assert Report.from_dict(plain).config == config
    assert "clip" not in plain["recipe"] and plain["recipe"].pop("full_range") is True
    plain["recipe"]["low_rank"] = 8
    then = Report.from_dict(plain).config
    assert then.parts == {"clip": False, "full_range": False, "low_rank": 8}
    assert replace(then.recipe, full_range=True, low_rank=0) == config.recipe


def test_damaged_reports_are_refused():
    plain = made_up().to_dict()
    for change, says in (
        ({"report_version": 99}, "99.*reads 1"),
        ({"layers": [{"fqn": "a"}]}, "in_features"),
        ({"recipe": ["sort"]}, "expected a table"),
        ({"recipe": {"colour": True}}, "unknown part 'colour'"),
        ({"recipe": {"clip": 3}}, "expected True or False"),
        ({"layers": [plain["layers"][0] | {"colour": 1}]}, "colour"),
    ):
        with pytest.raises(ReportError, match=says):
            Report.from_dict(plain | change)
    with pytest.raises(ReportError, match="seconds"):
        Report.from_dict({key: value for key, value in plain.items() if key != "seconds"})


def test_the_table_names_each_layer_and_each_reason():
    text = str(made_up())
    for word in ("b.q", "256 x 128", INT4, "norm", "-50.0 %", "16 bit"):
        assert word in text, word
    assert "final projection: it makes the output" in text
    assert "4 of 5 linears quantized; 1 of 2 regions" in text
    assert "4.00x smaller" in text
    assert "\x1b" not in text  # no colors in a log file


def test_rich_prints_a_table():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(made_up())
    assert "Left in float" in console.export_text()
