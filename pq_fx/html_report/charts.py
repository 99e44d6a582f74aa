"""The report's charts as inline SVG: errors by layer, histograms, errors by kind of layer.

Colours come from the page's style sheet, so that they follow light and dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from pq_fx.report import LayerReport

_WIDTH = 1072
_LEFT, _RIGHT = 52, 12
_BINS = 24


def measured(layers: Sequence[LayerReport]) -> list[tuple[int, LayerReport, float, float]]:
    """(place in the report, layer, error before, error after) where both are finite and above 0."""
    found = []
    for i, layer in enumerate(layers):
        before, after = layer.error_before, layer.error_after
        if before is None or after is None:
            continue
        if math.isfinite(before) and math.isfinite(after) and before > 0 and after > 0:
            found.append((i, layer, before, after))
    return found


def errors_by_layer(layers: Sequence[LayerReport]) -> str:
    """Each layer's error before and after, in the model's order, on a logarithmic axis; a click leads to its row."""
    rows, height = measured(layers), 300
    top, bottom = 26, height - 14
    low, high = _range([e for _, _, *both in rows for e in both])
    span = (_WIDTH - _LEFT - _RIGHT) / len(rows)
    radius = max(1.8, min(4.5, span / 2.4))

    def y(error: float) -> float:
        return bottom - (math.log10(error) - low) / (high - low) * (bottom - top)

    parts = [*_bands([layer.fqn for _, layer, _, _ in rows], span, height - 14)]
    for value in _ticks(low, high):
        parts.append(_line("grid", _LEFT, y(value), _WIDTH - _RIGHT, y(value)))
        parts.append(_text(_LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    for place, (i, layer, before, after) in enumerate(rows):
        x = _LEFT + (place + 0.5) * span
        kind = "better" if after <= before else "worse"  # an unchanged one's line has no length
        says = f"{layer.fqn}\nbefore {before:.3g}, after {after:.3g} ({_change(before, after)})"
        parts.append(
            f'<a href="#layer-{i}"><title>{escape(says)}</title>'
            + _line(f"link {kind}", x, y(before), x, y(after))
            + f'<circle class="before" cx="{x:.1f}" cy="{y(before):.1f}" r="{radius:.1f}"/>'
            + f'<circle class="after" cx="{x:.1f}" cy="{y(after):.1f}" r="{radius:.1f}"/></a>'
        )
    return _svg(_WIDTH, height, "Error of each layer before and after", parts)


def error_histogram(layers: Sequence[LayerReport]) -> str:
    """How many layers have an error of which size, before and after."""
    rows = measured(layers)
    before = [math.log10(b) for _, _, b, _ in rows]
    after = [math.log10(a) for _, _, _, a in rows]
    low, high = _range([10**e for e in (*before, *after)])
    bars = [("before", _counts(before, low, high)), ("after", _counts(after, low, high))]
    ticks = [(math.log10(v), f"{v:g}") for v in _ticks(low, high)]
    return _histogram("Number of layers by error", bars, low, high, ticks)


def change_histogram(layers: Sequence[LayerReport]) -> tuple[int, str]:
    """Number of layers whose error did not change, and how many of the others' fell or rose by how much."""
    rows = [(before, after) for _, _, before, after in measured(layers)]
    changes = [100 * (after / before - 1) for before, after in rows if not unchanged(before, after)]
    low = -100.0 if min(changes, default=0) < -50 else -50.0
    high = 20.0 if max(changes, default=0) < 20 else 100.0
    zero = round(-low / (high - low) * _BINS)
    counts = _counts([c for c in changes if c < 0], low, 0.0, zero)
    counts += _counts([c for c in changes if c > 0], 0.0, high, _BINS - zero)
    down = [n if i < zero else 0 for i, n in enumerate(counts)]
    up = [n if i >= zero else 0 for i, n in enumerate(counts)]
    ticks = [(float(v), f"{v:+d} %" if v else "0") for v in range(int(low), int(high) + 1, 20)]
    bars = [("better bar", down), ("worse bar", up)]
    what = "Number of layers by change of error"
    return len(rows) - len(changes), _histogram(what, bars, low, high, ticks, beside=False)


def unchanged(before: float, after: float) -> bool:
    """Whether a layer's error is what it was, to a thousandth of it."""
    return abs(after - before) <= 1e-3 * before


def kinds(layers: Sequence[LayerReport], limit: int = 14) -> list[tuple[str, int, float, float]]:
    """(name with * for numbers, layers, mean error before, after) of the kinds with the largest errors."""
    sums: dict[str, list[tuple[float, float]]] = {}
    for _, layer, before, after in measured(layers):
        sums.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.fqn), []).append((before, after))
    found = [
        (name, len(rows), sum(b for b, _ in rows) / len(rows), sum(a for _, a in rows) / len(rows))
        for name, rows in sums.items()
    ]
    return sorted(found, key=lambda row: -row[3])[:limit]


# Parts ------------------------------------------------------------------------------------------


def _bands(names: Sequence[str], span: float, bottom: float) -> Iterator[str]:
    """Stretches of layers with one first name, every other one shaded; named where the name has room."""
    start = 0
    for number, (name, group) in enumerate(groupby(names, key=lambda n: n.split(".")[0])):
        count = len(list(group))
        x, width = _LEFT + start * span, count * span
        if number % 2 == 0:
            yield f'<rect class="band" x="{x:.1f}" y="20" width="{width:.1f}" height="{bottom - 20:.1f}"/>'
        if len(name) * 6.2 < width:
            yield _text(x + width / 2, 13, name, "middle")
        start += count


def _histogram(
    what: str,
    bars: Sequence[tuple[str, Sequence[int]]],
    low: float,
    high: float,
    ticks: Sequence[tuple[float, str]],
    beside: bool = True,
) -> str:
    width, height, left, bottom = 520, 210, 34, 182
    tallest = max(max(counts) for _, counts in bars) or 1
    unit = (width - left - 8) / _BINS
    parts = []
    for share in (0.5, 1.0):
        y = bottom - share * (bottom - 14)
        count = tallest * share
        if count == int(count):
            parts += [
                _line("grid", left, y, width - 8, y),
                _text(left - 6, y + 4, f"{count:g}", "end"),
            ]
    parts.append(_line("grid", left, bottom, width - 8, bottom))
    thick = (unit - 2) / (len(bars) if beside else 1)
    for number, (name, counts) in enumerate(bars):
        for i, count in enumerate(counts):
            if count:
                x = left + i * unit + 1 + (number * thick if beside else 0)
                tall = count / tallest * (bottom - 14)
                parts.append(
                    f'<rect class="{name}" x="{x:.1f}" y="{bottom - tall:.1f}" width="{thick:.1f}" '
                    f'height="{tall:.1f}"><title>{count} layers</title></rect>'
                )
    for value, text in ticks:
        x = left + (value - low) / (high - low) * (width - left - 8)
        anchor = "end" if x > width - 24 else "middle"
        parts.append(_text(min(x, width - 4), bottom + 18, text, anchor))
    return _svg(width, height, what, parts)


def _counts(values: Sequence[float], low: float, high: float, bins: int = _BINS) -> list[int]:
    counts = [0] * bins
    for value in values:
        place = int((value - low) / (high - low) * bins)
        counts[min(max(place, 0), bins - 1)] += 1
    return counts


def _range(errors: Sequence[float]) -> tuple[float, float]:
    """Exponents of 10 around all errors, with a little room, at least half a decade apart."""
    low, high = math.log10(min(errors)), math.log10(max(errors))
    room = max(0.06 * (high - low), (0.5 - (high - low)) / 2)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    steps = (1.0,) if high - low > 2.5 else (1.0, 2.0, 5.0)
    every = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    return [value for value in every if low <= math.log10(value) <= high]


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, what: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(what)}">'
        + "".join(parts)
        + "</svg>"
    )
