"""The report page, section by section."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path

from pq_fx.comparison import Comparison
from pq_fx.html_report import charts
from pq_fx.html_report.pictures import pictures
from pq_fx.html_report.source import Subject
from pq_fx.report import LayerReport, Report, size_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(subject: Subject, images: Path | None = None) -> str:
    """The whole page.

    Args:
        subject: what it is about.
        images: a folder that `pq-fx compare` wrote; its pictures are embedded.

    Raises:
        PipelineError: `images` is not such a folder, or a picture in it cannot be read.
    """
    comparison = None if images is None else Comparison.read(images)
    report = subject.report
    title = f"{subject.model_class}, {_what(report)}"
    body = [*_head(subject), *_errors(report)]
    if comparison is not None and images is not None:
        body += pictures(comparison, images)
    body += [*_table(report), *_skips(report), *_settings(report)]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>\n{_asset('style.css')}</style>\n</head>",
            "<body>\n<main>",
            *body,
            f"</main>\n<script>\n{_asset('table.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return (files("pq_fx.html_report") / name).read_text(encoding="utf-8")


def _what(report: Report) -> str:
    config = report.config
    weight, activation = config.weight.key, config.activation
    inputs = "16-bit activations" if activation is None else f"{activation.key} activations"
    if activation is not None and activation.key == weight:
        return f"{weight} weights and activations, {config.method}"
    return f"{weight} weights, {inputs}, {config.method}"


# Head -------------------------------------------------------------------------------------------


def _head(subject: Subject) -> Iterator[str]:
    report = subject.report
    yield f"<h1>{escape(subject.model_class)}</h1>"
    folder = f"<code>{escape(subject.folder)}</code>"
    yield f'<p class="lead">{escape(_what(report))} &middot; {folder}</p>'
    yield '<dl class="tiles">'
    yield _tile(
        "Linears quantized",
        f"{len(report.quantized)} of {len(report.layers)}",
        f"{len(report.skipped)} left in float" if report.skipped else "none left in float",
    )
    if report.weight_bytes and report.float_weight_bytes:
        yield _tile(
            "Size of the model",
            size_text(report.weight_bytes),
            f"{report.float_weight_bytes / report.weight_bytes:.1f} times smaller than "
            f"{size_text(report.float_weight_bytes)}",
        )
    before, after = report.mean_layer_error_before, report.mean_layer_error
    if before and after:
        change = 100 * (after / before - 1)
        kind = "better" if change < 0 else "worse"
        yield _tile(
            "Mean layer error",
            f"{after:.3g}",
            f'<span class="{kind}">{change:+.0f} %</span> against rounding alone ({before:.3g})',
        )
    if report.regions:
        yield _tile(
            "Regions changed",
            f"{report.accepted_regions} of {report.regions}",
            "reordered or rotated where held-out error fell",
        )
    calls = f"{report.calibration_calls} calls" if report.calibration_calls else "calls not known"
    yield _tile(
        "Converting took",
        f"{report.seconds:.3g} s",
        f"on {escape(report.device)}, calibrated on {calls}",
    )
    yield "</dl>"


def _tile(name: str, value: str, more: str) -> str:
    return f'<div><dt>{name}</dt><dd class="value">{value}</dd><dd class="more">{more}</dd></div>'


# Errors -----------------------------------------------------------------------------------------


def _errors(report: Report) -> Iterator[str]:
    yield "<h2>Error of each layer</h2>"
    if not charts.measured(report.layers):
        yield '<p class="note">No layer has a measured error.</p>'
        return
    yield (
        '<p class="note">Squared error of the layer\'s output, relative to the output, on calibration rows that '
        "nothing was fitted to. <em>Before</em>: rounded in the model's own channel order, without rotation. "
        "<em>After</em>: as it was converted. In the model's order; point at a layer for its name, click for its "
        "row.</p>"
    )
    yield (
        '<p class="legend"><span><i class="before"></i>before</span><span><i class="after"></i>after</span></p>'
    )
    yield f'<figure class="wide">{charts.errors_by_layer(report.layers)}</figure>'
    yield '<div class="pair">'
    yield f"<figure><h3>Layers by error</h3>{charts.error_histogram(report.layers)}</figure>"
    same, chart = charts.change_histogram(report.layers)
    note = f' <span class="note">({same} more as they were)</span>' if same else ""
    yield f"<figure><h3>Layers by change of error{note}</h3>{chart}</figure>"
    yield "</div>"
    yield "<h2>Where the error is</h2>"
    yield '<p class="note">Mean over the layers whose names differ in their numbers only, largest first.</p>'
    yield '<div class="scroll"><table><thead><tr><th>kind of layer</th><th class="num">layers</th>'
    yield '<th class="num">before</th><th class="num">after</th><th class="num">change</th></tr></thead><tbody>'
    for name, count, before, after in charts.kinds(report.layers):
        yield (
            f'<tr><td class="layer">{_name(name)}</td><td class="num">{count}</td><td class="num">{before:.3g}</td>'
            f'<td class="num">{after:.3g}</td>{_change_cell(before, after)}</tr>'
        )
    yield "</tbody></table></div>"


# Layers -----------------------------------------------------------------------------------------

_COLUMNS = (
    ("layer", ""),
    ("in &times; out", "num"),
    ("weights", ""),
    ("input", ""),
    ("order", ""),
    ("rot.", "num"),
    ("before", "num"),
    ("after", "num"),
    ("change", "num"),
)
_ABSORB = {"fold": "fold", "norm": "norm", "quantize": "quantizer"}


def _table(report: Report) -> Iterator[str]:
    if not report.quantized:
        return
    yield "<h2>Quantized layers</h2>"
    yield (
        '<p class="note"><em>order</em>: what puts the input channels into a new order. A <em>fold</em> into the '
        "weights around is free; the <em>norm</em> before or the <em>quantizer</em> of the input read in another "
        "order. <em>rot.</em>: size of the Hadamard blocks that the input is rotated in.</p>"
    )
    yield '<div class="tools" hidden><input id="filter" type="search" placeholder="Filter: to_q, fold, 3072 ..."'
    count = len(report.quantized)
    yield f' aria-label="Filter layers"><span id="count" class="note">{count} of {count}</span></div>'
    yield '<div class="scroll"><table id="layers"><thead><tr>'
    for name, kind in _COLUMNS:
        yield f'<th class="{kind}" aria-sort="none"><button type="button">{name}</button></th>'
    yield "</tr></thead><tbody>"
    for i, layer in enumerate(report.layers):
        if layer.quantized:
            yield _row(i, layer)
    yield "</tbody></table></div>"


def _row(i: int, layer: LayerReport) -> str:
    size = layer.in_features * layer.out_features
    extras = [f"smoothed ({layer.smooth})"] if layer.smooth else []
    extras += [f"rank {layer.low_rank}"] if layer.low_rank else []
    extras += [f"clip {layer.clip:g}"] if layer.clip != 1 else []
    alpha = "" if layer.alpha is None else f" &alpha;={layer.alpha:g}"
    absorb = _ABSORB.get(layer.absorb or "", "")
    note = f'<br><span class="note">{escape(", ".join(extras))}</span>' if extras else ""
    return (
        f'<tr id="layer-{i}"><td class="layer">{_name(layer.fqn)}{note}</td>'
        f'<td class="num" data-sort="{size}">{layer.in_features} &times; {layer.out_features}</td>'
        f'<td class="format">{escape(layer.format or "")}</td>'
        f'<td class="format">{escape(layer.activation_format or "16 bit")}</td>'
        f'<td class="format">{absorb}{alpha if absorb else ""}</td>'
        f'<td class="num" data-sort="{layer.rotation}">{layer.rotation or ""}</td>'
        f"{_error_cell(layer.error_before)}{_error_cell(layer.error_after)}"
        f"{_change_cell(layer.error_before, layer.error_after)}</tr>"
    )


def _name(fqn: str) -> str:
    """A layer's name with its path dimmed, breakable after each dot."""
    path, dot, last = fqn.rpartition(".")
    steps = "".join(f"{escape(step)}.<wbr>" for step in path.split(".")) if dot else ""
    return f'<span class="name"><span class="path">{steps}</span>{escape(last)}</span>'


def _error_cell(error: float | None) -> str:
    if error is None:
        return '<td class="num" data-sort=""></td>'
    key = repr(error) if math.isfinite(error) else ""
    return f'<td class="num" data-sort="{key}">{error:.3g}</td>'


def _change_cell(before: float | None, after: float | None) -> str:
    if not before or after is None or not math.isfinite(before + after):
        return '<td class="num" data-sort=""></td>'
    change = 100 * (after / before - 1)
    if charts.unchanged(before, after):
        return '<td class="num note" data-sort="0">as it was</td>'
    kind = "worse" if change > 0 else "better"
    meter = f'<span class="meter"><b class="{kind}" style="width:{min(abs(change), 100):.0f}%"></b></span>'
    return f'<td class="num" data-sort="{change!r}"><span class="{kind}">{change:+.1f} %</span>{meter}</td>'


def _skips(report: Report) -> Iterator[str]:
    if not report.skipped:
        return
    reasons: dict[str, list[LayerReport]] = {}
    for layer in report.skipped:
        reasons.setdefault(layer.skip_reason or "", []).append(layer)
    yield "<h2>Left in float, and why</h2>"
    for reason, layers in sorted(reasons.items(), key=lambda item: -len(item[1])):
        word = "layer" if len(layers) == 1 else "layers"
        shown = " open" if len(layers) <= 8 else ""
        yield f"<details{shown}><summary>{escape(reason[:1].upper() + reason[1:])} "
        yield f'<span class="count">{len(layers)} {word}</span></summary><ul>'
        for layer in layers:
            shape = f"{layer.in_features} &times; {layer.out_features}"
            yield f'<li>{_name(layer.fqn)} <span class="note">{shape}</span></li>'
        yield "</ul></details>"


def _settings(report: Report) -> Iterator[str]:
    plain = json.dumps(report.config.to_dict(), indent=2)
    yield "<h2>Settings</h2>"
    yield f"<details><summary>QuantConfig</summary><pre>{escape(plain)}</pre></details>"
