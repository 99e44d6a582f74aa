"""Draws what bench/generalisation.py measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {"permuquant-h": "#0b6e99", "best": "#c2410c"}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A row for each model. Left: calibrated on the test's times or prompts, or on others. Right: number of prompts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * len(results)), dpi=150)
    FigureCanvasAgg(figure)
    for (left, right), result in zip(
        figure.subplots(len(results), 2, squeeze=False), results, strict=True
    ):
        _plot_transfer(left, result)
        _plot_sizes(right, result, [r for r in result["runs"] if r.get("part") == "size"])
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            axes.set_ylabel("velocity rel. MSE on the test prompts", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def _plot_transfer(axes: Any, result: dict[str, Any]) -> None:
    cases = (
        ("same times", "other prompts", "unseen"),
        ("other times", "other prompts", "seen"),
        ("all times,\nsame prompts", "same prompts", "all"),
        ("all times,\nother prompts", "other prompts", "all"),
    )
    for shift, (method, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        for place, (_, prompts, times) in enumerate(cases):
            own = [
                r["unseen"]
                for r in result["runs"]
                if (r["method"], r.get("prompts"), r["times"]) == (method, prompts, times)
                and "part" not in r
            ]
            if own:
                label = method if place == 0 else None
                axes.bar(place + shift, sum(own) / len(own), 0.36, color=color, label=label)
                axes.plot([place + shift] * len(own), own, ".", color="#222222", markersize=3)
    rtn = next(r for r in result["runs"] if r["method"] == "rtn")
    axes.axhline(rtn["unseen"], color="#888888", linewidth=1, label="RTN")
    axes.set_xticks(range(len(cases)), [c[0] for c in cases])
    axes.set_title(f"{result['arch']}, {result['format']}: calibrated on", fontsize=9)


def _plot_sizes(axes: Any, result: dict[str, Any], sized: list[dict[str, Any]]) -> None:
    rtn = next(r for r in result["runs"] if r["method"] == "rtn")
    axes.axhline(rtn["unseen"], color="#888888", linewidth=1, label="RTN")
    for method, color in COLORS.items():
        own = [r for r in sized if r["method"] == method]
        sizes = sorted({r["size"] for r in own})
        if own:
            means = [
                sum(v) / len(v)
                for v in ([r["unseen"] for r in own if r["size"] == s] for s in sizes)
            ]
            axes.plot([r["size"] for r in own], [r["unseen"] for r in own], ".", color=color)
            axes.plot(sizes, means, color=color, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("calibration prompts", fontsize=8)
    axes.set_title(f"{result['arch']}: other prompts and other times; a point a seed", fontsize=9)
