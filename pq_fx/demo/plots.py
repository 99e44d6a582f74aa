"""The demo's pictures: a grid of drawn images, and errors before and after per layer.

Drawn with matplotlib's file-only backend, so neither needs a display.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from pq_fx.errors import ConfigError

INK = "#222222"
BEFORE, AFTER = "#c9c9c9", "#0b6e99"


def grid(
    path: str | Path,
    rows: Sequence[tuple[str, torch.Tensor]],
    column_labels: Sequence[str],
    *,
    title: str | None = None,
) -> None:
    """Write a picture of image rows: labels on the left, prompts on top.

    Args:
        path: PNG (or any file type of matplotlib) to write.
        rows: (label, images [n, 3, H, W] in 0..1); n is the same in all rows. A label may have
            several lines.
        column_labels: one prompt a column, n of them.
        title: a line above all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(column_labels)
    if not rows or any(len(images) != columns for _, images in rows):
        counts = [len(images) for _, images in rows]
        raise ConfigError(f"grid needs {columns} images in every row, got {counts}")
    cell, left, top = 0.82, 1.75, 0.5 + (0.25 if title else 0)  # inches
    width, height = left + cell * columns + 0.1, top + cell * len(rows) + 0.1
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    for r, (label, images) in enumerate(rows):
        bottom = height - top - (r + 1) * cell
        pictures = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        figure.text(
            (left - 0.12) / width,
            (bottom + cell / 2) / height,
            label,
            ha="right",
            va="center",
            fontsize=9,
            color=INK,
            linespacing=1.25,
        )
        for c in range(columns):
            box = (left + c * cell, bottom, cell * 0.94, cell * 0.94)
            axes = figure.add_axes(
                (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
            )
            axes.imshow(pictures[c], interpolation="lanczos")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color="#dddddd", linewidth=0.6)
            if r == 0:
                text = textwrap.fill(column_labels[c], 12, max_lines=3)
                axes.set_title(text, fontsize=7, color=INK, pad=3)
    if title:
        y = 1 - 0.18 / height
        figure.text(0.5, y, title, ha="center", va="center", fontsize=11, color=INK)
    figure.savefig(path)


def layer_errors(
    path: str | Path,
    names: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    *,
    before_label: str = "RTN",
    after_label: str = "PermuQuant",
    title: str | None = None,
) -> None:
    """Write a horizontal bar chart of one error per layer, before and after, with the change.

    Args:
        path: PNG (or any file type of matplotlib) to write.
        names: layer names, drawn from top to bottom in this order.
        before: relative squared output error of each layer; positive.
        after: the same, after.
        before_label: legend entry of ``before``.
        after_label: legend entry of ``after``.
        title: a line above all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not names or not len(names) == len(before) == len(after):
        raise ConfigError(
            f"layer_errors needs as many errors as names, got {len(names)} names, "
            f"{len(before)} and {len(after)} errors"
        )
    count = len(names)
    figure = Figure(figsize=(8.5, 1.3 + 0.26 * count), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, values, color, label in (
        (-0.2, before, BEFORE, before_label),
        (0.2, after, AFTER, after_label),
    ):
        places = [i + offset for i in range(count)]
        axes.barh(places, list(values), height=0.38, color=color, label=label)
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        if b > 0:
            axes.annotate(
                f"{(a / b - 1) * 100:+.0f} %",
                (max(a, b), i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=INK,
            )
    axes.set_yticks(range(count), list(names), fontsize=7)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(0, max(*before, *after) * 1.12 or 1)
    axes.set_xlabel("relative squared error of the layer's output", fontsize=8, color=INK)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
    )
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left")
    figure.tight_layout()
    figure.savefig(path)
