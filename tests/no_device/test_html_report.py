"""The report page, opened in headless Chromium where the machine has one, else parsed; the test says which.

A browser is looked for under the names in `NAMES` on the PATH, then among Playwright's downloads. Without one
`test_the_page_works` checks the same page with Python's HTML parser only and warns that sorting was not tried.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import pq_fx
from pq_fx import cli
from pq_fx.comparison import Comparison, compare
from pq_fx.errors import CheckpointError, ConfigError, PipelineError
from pq_fx.html_report import charts, find_subject, page
from pq_fx.picture_distance import psnr, structural_distance
from pq_fx.report import LayerReport, Report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE = '<img src=x onerror="document.title=1">'
LONG = "a_very_long_container_of_blocks.17.with_a_module.and_another_one_inside." * 3 + "to_q"


def browser() -> str | None:
    for name in NAMES:
        if found := shutil.which(name):
            return found
    downloads = sorted(Path.home().glob(".cache/ms-playwright/chromium*/chrome-linux*/*"))
    fitting = [f for f in downloads if f.name in ("chrome", "headless_shell")]
    return str(fitting[-1]) if fitting else None


def report() -> Report:
    """Five blocks of four layers; errors fall with the layer's number, one rises, one did not change."""
    layers = []
    for i in range(20):
        before = 0.02 / (i + 1)
        layers.append(
            LayerReport(
                f"blocks.{i // 4}.attn.to_{'qkvo'[i % 4]}", 256, 64 * (1 + i % 3), "int4:64:bf16", "int4:64:bf16",
                f"region{i // 3}", "fold" if i % 2 else "norm", 0.5, 64, before, before * (0.4 + 0.02 * i), True,
            )
        )  # fmt: skip
    layers[3] = replace(layers[3], error_after=0.05)
    layers[5] = replace(layers[5], error_after=layers[5].error_before, accepted=False)
    layers[7] = replace(layers[7], error_before=None, error_after=None)
    layers[9] = replace(layers[9], error_after=math.inf, low_rank=32, clip=0.9, smooth="folded")
    layers += [
        LayerReport(LONG, 256, 256, "int4:64:bf16", None, error_before=0.01, error_after=0.01),
        LayerReport("embed", 16, 256, skip_reason="embedder: it reads an input"),
        LayerReport(HOSTILE, 16, 256, skip_reason=f"because of {HOSTILE}"),
    ]
    config = pq_fx.QuantConfig("int4", 64)
    return Report(tuple(layers), config, 12.5, 6_460_000, 36_900_000, 48, "cpu")


def save(folder: Path, found: Report) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "TinyTransformer"}))
    (folder / "quantization_report.json").write_text(found.to_json())
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "compared"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    a = [torch.rand(1, 3, 32, 40, generator=generator) for _ in range(2)]
    b = [(x + 0.1).clamp(0, 1) for x in a]
    compare(folder, ("float", "w4a4"), ["a <red> cat", "the sea"], 3, (a, b), {"steps": 2})
    return folder


@pytest.fixture
def html(tmp_path: Path, images: Path) -> str:
    return page(find_subject(save(tmp_path / "model", report())), images)


class Tags(HTMLParser):
    """Tags with their attributes, checked to be closed in order, and the text between them."""

    VOID = frozenset(("meta", "br", "img", "input", "wbr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


PROBE = """
<script>
  const table = document.getElementById("layers");
  const names = () => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].textContent.trim());
  const press = i => { table.tHead.rows[0].cells[i].querySelector("button").click(); return names(); };
  const filter = document.getElementById("filter");
  const type = t => { filter.value = t; filter.dispatchEvent(new Event("input")); return names(); };
  const heights = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().height);
  const found = {
    start: names(), up: press(7), down: press(7), sort: table.tHead.rows[0].cells[7].getAttribute("aria-sort"),
    size: press(1), name: press(0), filtered: type("to_q norm"), count: document.getElementById("count").textContent,
    nothing: type("nowhere"), all: type(""), heights, errors: window.failures || 0,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    images: [...document.images].map(i => i.naturalWidth), title: document.title,
    tools: getComputedStyle(filter.parentElement).display, requests: performance.getEntriesByType("resource")
      .map(r => r.name).filter(n => !n.startsWith("data:")),
  };
  const out = document.createElement("pre"); out.id = "probe"; out.textContent = JSON.stringify(found);
  document.body.append(out);
</script>
"""


def in_browser(chromium: str, html: str, folder: Path, width: int) -> dict:
    """Open the page with a script that sorts and filters, and return what it saw."""
    first = (
        "<script>window.failures = 0; addEventListener('error', () => window.failures++);</script>"
    )
    file = folder / "probed.html"
    file.write_text(html.replace("<body>", f"<body>{first}").replace("</body>", f"{PROBE}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [chromium, *flags, "--virtual-time-budget=5000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-2000:] + done.stderr[-2000:]
    import html as escaping

    return json.loads(escaping.unescape(match[1]))


def test_the_page_works(html: str, tmp_path: Path, record_property: pytest.FixtureRequest) -> None:
    tags = Tags(html)
    layers = [layer.fqn for layer in report().layers if layer.quantized]
    chromium = browser()
    record_property("browser", chromium or "none: the page was parsed")
    rows = [a["id"] for a in tags.all("tr") if str(a.get("id", "")).startswith("layer-")]
    assert len(rows) == len(layers) == 21
    if chromium is None:
        warnings.warn("no browser found: the page was parsed, sorting was not tried", stacklevel=1)
        return
    for width in (1200, 500):
        seen = in_browser(chromium, html, tmp_path, width)
        assert seen["errors"] == 0
        assert seen["requests"] == []
        assert seen["start"] == [
            f"{n}smoothed (folded), rank 32, clip 0.9" if n == layers[9] else n for n in layers
        ]
        first = [name.split("smoothed")[0] for name in seen["up"]]
        known = {x.fqn: x.error_after for x in report().layers if x.quantized}
        finite = [n for n in layers if known[n] is not None and math.isfinite(known[n])]
        assert first[: len(finite)] == sorted(finite, key=lambda n: known[n])
        assert set(first[len(finite) :]) == {
            layers[7],
            layers[9],
        }  # without a number: last, both ways
        down = [name.split("smoothed")[0] for name in seen["down"]]
        assert down[: len(finite)] == sorted(finite, key=lambda n: -known[n])
        assert set(down[len(finite) :]) == {layers[7], layers[9]}
        assert seen["sort"] == "descending"
        sizes = {x.fqn: x.in_features * x.out_features for x in report().layers}
        ordered = [sizes[name.split("smoothed")[0]] for name in seen["size"]]
        assert ordered == sorted(ordered)
        assert seen["name"][0] == LONG
        assert seen["filtered"] == [n for n in sorted(layers) if "to_q" in n and n != LONG]
        assert seen["count"] == f"{len(seen['filtered'])} of 21"
        assert seen["nothing"] == []
        assert len(seen["all"]) == 21
        assert len(seen["heights"]) == 3
        assert min(seen["heights"]) > 80
        assert (
            seen["wide"] <= 0
        )  # only the table and the wide chart scroll sideways, inside themselves
        assert seen["images"] == [40, 40, 40, 40]
        assert seen["tools"] == "flex"
        assert seen["title"].startswith("TinyTransformer, int4:64:bf16")


def test_the_page_needs_nothing_and_runs_nothing_of_its_data(html: str) -> None:
    tags = Tags(html)
    sources = [a.get(k) for _, a in tags.found for k in ("src", "href") if a.get(k)]
    assert all(s.startswith(("data:image/", "#layer-")) for s in sources)
    assert "http:" not in html.replace("http-equiv", "")
    assert "https:" not in html
    assert "@import" not in html
    assert len(tags.all("img")) == 4  # the hostile name is text
    assert len(tags.all("script")) == 1
    assert tags.text.count(HOSTILE) >= 2
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_says_what_the_report_says(html: str) -> None:
    text = " ".join(Tags(html).text.split())
    found = report()
    for words in (
        "21 of 23", "2 left in float", "6.46 MB", "5.7 times smaller than 36.90 MB", "7 of 7", "12.5 s",
        "int4:64:bf16 weights and activations, permuquant-h", "Embedder: it reads an input 1 layer",
        "a <red> cat seed 3", "as it was", "smoothed (folded), rank 32, clip 0.9", "2 more as they were",
    ):  # fmt: skip
        assert words in text, words
    anchors = {a["href"] for a in Tags(html).all("a")}
    assert len(anchors) == len(charts.measured(found.layers)) == 19
    assert len(Tags(html).all("circle")) == 2 * 19


def test_equal_reports_give_equal_pages(html: str, tmp_path: Path, images: Path) -> None:
    assert page(find_subject(save(tmp_path / "again" / "model", report())), images) == html


def test_kinds_are_means_over_numbers() -> None:
    rows = charts.kinds(report().layers)
    assert [r[3] for r in rows] == sorted((r[3] for r in rows), reverse=True)
    by_name = {name: (count, before, after) for name, count, before, after in rows}
    count, before, _ = by_name["blocks.*.attn.to_q"]
    assert count == 5
    assert before == pytest.approx(sum(0.02 / (i + 1) for i in range(0, 20, 4)) / 5)


@pytest.mark.parametrize("layers", [0, 1])
def test_reports_with_little_in_them(layers: int, tmp_path: Path) -> None:
    kept = report().layers[:layers] + report().layers[-2:]
    text = page(find_subject(save(tmp_path / "m", replace(report(), layers=kept))))
    assert ("No layer has a measured error" in text) == (layers == 0)
    assert Tags(text).all("h1")


def test_the_command(
    tmp_path: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save(tmp_path / "pipe" / "transformer", report()).parent
    assert cli.main(["report", str(model)]) == 0
    assert "report.html: 23 layers" in capsys.readouterr().out
    assert "TinyTransformer" in (tmp_path / "report.html").read_text()
    assert cli.main(["report", str(model), "--out", "with.html", "--images", str(images)]) == 0
    assert (tmp_path / "with.html").stat().st_size > (tmp_path / "report.html").stat().st_size
    save(model / "transformer_2", report())
    capsys.readouterr()
    for arguments, says in (
        ([str(model)], "reports of transformer, transformer_2; choose one by --component"),
        ([str(tmp_path)], "found none"),
        (["nowhere"], "nowhere is not a folder"),
        ([str(model / "transformer"), "--images", str(model)], "holds no compare.json"),
    ):
        assert cli.main(["report", *arguments, "--out", "no.html"]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no.html").exists()
    assert cli.main(["report", str(model), "--component", "transformer_2"]) == 0


def test_a_comparison_comes_back_and_damage_is_named(images: Path) -> None:
    made = Comparison.read(images)
    assert [p.seed for p in made.pairs] == [3, 4]
    assert {f.name for f in images.iterdir()} == {
        "000_a.png", "000_b.png", "001_a.png", "001_b.png", "side_by_side.png", "compare.json",
    }  # fmt: skip
    assert 18 < made.mean_psnr_db < 25  # a shift by 0.1 is 20 dB, less where it is cut off at 1
    (images / "001_b.png").write_bytes(b"no picture")
    with pytest.raises(PipelineError, match="001_b.png cannot be read"):
        page(find_subject(save(images.parent / "m", report())), images)
    (images / "compare.json").write_text('{"comparison_version": 9}')
    with pytest.raises(PipelineError, match="version 9; this release reads 1"):
        Comparison.read(images)
    (images.parent / "m" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        find_subject(images.parent / "m")


def test_distances_of_pictures() -> None:
    a = torch.rand(3, 3, 40, 33, generator=torch.Generator().manual_seed(1))
    assert psnr(a, a).tolist() == [math.inf] * 3
    assert structural_distance(a, a).abs().max() < 1e-12
    near, far = (a + 0.01).clamp(0, 1), torch.rand_like(a)
    assert (psnr(a, near) > 38).all()
    assert (structural_distance(a, near) < structural_distance(a, far)).all()
    want = 10 * torch.log10(1 / (a[1] - far[1]).double().pow(2).mean())
    assert psnr(a, far)[1] == pytest.approx(float(want))
    with pytest.raises(ConfigError, match="at least 28 pixels"):
        structural_distance(a[..., :27], a[..., :27])
    with pytest.raises(ConfigError, match="one shape"):
        psnr(a, a[:2])
