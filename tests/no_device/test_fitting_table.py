"""Tables of reports in terminals of every width: names and figures are whole, columns that do not fit are named."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from pq_fx.config import QuantConfig
from pq_fx.fitting_table import Column, FittingTable
from pq_fx.inspection_report import Inspection, LinearInspection
from pq_fx.report import LayerReport, Report

INT4 = "int4:64:bf16"
NAMES = [f"single_transformer_blocks.{i}.attn.to_{x}" for i in (0, 10) for x in "qkv"]


def printed(what: object, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def report() -> Report:
    rows = [
        LayerReport(n, 3072, 12288, INT4, INT4, "r", "stream", 0.5, 64, 0.0123, 0.0321, True)
        for n in NAMES
    ]
    return Report([*rows, LayerReport("proj_out", 3072, 64, skip_reason="final")], QuantConfig())


@pytest.mark.parametrize("width", [60, 80, 100, 120, 170, 300])
def test_a_report_keeps_names_and_errors_whole(width: int) -> None:
    text = printed(report(), width)
    lines = [line for line in text.splitlines() if line.strip()]
    assert all(len(line) <= width for line in lines) and "…" not in text
    rows = {line.split()[0]: line for line in lines}
    for name in NAMES:
        assert "3.210e-02" in rows[name]
        assert ("+161.0 %" in rows[name]) == (width >= 80)
        assert (INT4 in rows[name]) == (width >= 100)
    left_out = re.findall(r"left out at this width: (.*)", text)
    assert bool(left_out) == (width < 170)
    if width == 120:
        assert left_out == ["in x out, absorbed, region, rot., alpha"]


@pytest.mark.parametrize("width", [80, 160])
def test_an_inspection_keeps_names_whole(width: int) -> None:
    rows = [
        LinearInspection(
            n, 3072, 12288, "quantize", INT4, INT4, "r", "p", "stream", 10, 10, in_block=True
        )
        for n in NAMES
    ]
    sizes = {"parameters": 100, "regions": 1, "attention_flops": 0}
    made = Inspection("M", tuple(rows), QuantConfig(), float_bytes=1, quantized_bytes=1, **sizes)
    text = printed(made, width)
    assert "single_transformer_blocks.*.attn.to_q " in text and "33.33 %" in text
    assert ("left out at this width" in text) == (width == 80)
    assert (f"{INT4}   {INT4}" in text) == (width == 160)


def test_the_least_important_columns_go_first_and_the_rest_folds() -> None:
    names = Column("name", ["a" * 30], folds=True)
    others = [Column(x, [x * 10], rank) for x, rank in (("b", 2), ("c", 1), ("d", 3), ("e", 0))]
    table = FittingTable("title", [names, *others])
    for width, shown in ((100, "bcde"), (80, "bce"), (66, "ce"), (50, "e")):
        text = printed(table, width)
        assert [x for x in "bcde" if x * 10 in text] == list(shown), width
        assert "a" * 30 in text
    narrow = printed(table, 30)
    assert narrow.count("a") == 30 + "left out at this width".count("a") + "name".count("a")
    assert "e" * 10 in narrow
