"""``pq-fx demo``: the embedded model drawn at full precision, at 4 bits and at 3 bits.

One calibration serves all runs, every run draws from the same noise, and only the weights and
activations differ, so a picture's distance to the float model's picture is quantization alone.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from pq_fx.config import QuantConfig
from pq_fx.demo.model import load_model, velocity
from pq_fx.demo.plots import grid, layer_errors
from pq_fx.demo.prompts import embed, load_prompts
from pq_fx.demo.sampling import noise, sample
from pq_fx.demo.table import FORMATS, GROUP_SIZE, METHODS, Run, explanation, table
from pq_fx.errors import ConfigError
from pq_fx.picture_distance import psnr
from pq_fx.quantizer import prepare
from pq_fx.report import Report
from pq_fx.statistics import Statistics

# Sized for 2 CPU cores and 6 minutes, most of which the quantized models' 6 x 12 steps take.
STEPS = 12
CALIBRATION_IMAGES = 16
CALIBRATION_STEPS = 8
CALIBRATION_ROWS = 1024
# Times at which velocities are compared: from nearly noise to nearly a picture.
VELOCITY_TIMES = (0.9, 0.6, 0.3, 0.05)
# Noise of the velocity comparison and of calibration must not be what the pictures start from.
_OTHER_NOISE = 7_919


def run_demo(
    out: str | os.PathLike[str],
    *,
    images: int = 16,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "cpu",
    texts: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Write grid.png, layers.png and report.json into `out`, print the table, return the report.

    Args:
        out: folder to write into; made if it is missing.
        images: pictures a run, one for each of the first demo prompts.
        steps: Euler steps a picture.
        seed: of the noise and of the calibration's choice of rows.
        device: "cpu" or a GPU that the kernels support.
        texts: draw these instead of the first demo prompts; texts that the package has no embedding
            of need the extra `pq-fx[text]` (MissingTextEncoderError says so).
        console: where to print; the terminal by default.
    """
    console = console or Console()
    folder = Path(out)
    if steps < 1:
        raise ConfigError(f"steps is {steps}; expected at least 1")
    if texts:
        names, embeddings = list(texts), embed(list(texts))
    else:
        prompts = load_prompts("demo")
        if not 1 <= images <= len(prompts.names):
            raise ConfigError(
                f"images is {images}; expected 1 to {len(prompts.names)} (demo prompts)"
            )
        names, embeddings = list(prompts.names[:images]), prompts.take(images).embeddings
    images = len(names)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model("flux").to(device)
    batches = math.ceil(images / 16)
    work = steps * batches
    total = work + CALIBRATION_STEPS * math.ceil(CALIBRATION_IMAGES / 16)
    total += len(FORMATS) * len(METHODS) * (work + len(VELOCITY_TIMES))

    with _progress(console) as bar:
        task = bar.add_task("", total=total)

        def draw(any_model: nn.Module, what: str) -> torch.Tensor:
            bar.update(task, description=what)
            tick = _ticker(bar, task)
            return sample(any_model, embeddings, steps, seed, progress=tick)

        pictures = draw(model, "drawing at full precision")
        bar.update(task, description="calibrating")
        statistics = _calibrate(model, seed, _ticker(bar, task))
        points = _velocity_points(pictures, seed, device)
        text = embeddings.to(device)
        wanted = [_velocity(model, x, t, text) for x, t in points]
        rows = [("full precision\n(float32)", pictures)]
        runs: list[Run] = []
        reports: dict[tuple[str, str], Report] = {}
        for name in FORMATS:
            for method, label in METHODS.items():
                start = time.perf_counter()
                what = f"{name} g{GROUP_SIZE} {label}"
                bar.update(task, description=f"{what}: choosing and packing")
                config = _config(name, seed, method)
                quantized = copy.deepcopy(model)
                report = prepare(quantized, config, statistics=statistics).convert()
                drawn = draw(quantized, f"{what}: drawing")
                seconds = time.perf_counter() - start
                errors = []
                for (x, t), v in zip(points, wanted, strict=True):
                    got = _velocity(quantized, x, t, text)
                    errors.append(float((got - v).square().sum() / v.square().sum()))
                    bar.advance(task)
                run = Run(
                    name,
                    GROUP_SIZE,
                    method,
                    float(psnr(drawn, pictures).mean()),
                    sum(errors) / len(errors),
                    report.mean_layer_error,
                    report.regions,
                    report.accepted_regions,
                    report.weight_bytes,
                    report.float_weight_bytes,
                    seconds,
                )
                runs.append(run)
                reports[name, method] = report
                rows.append((f"{what}\n{run.psnr_db:.1f} dB", drawn))
                if not console.is_terminal:
                    console.print(f"{what}: {run.psnr_db:.2f} dB, {seconds:.0f} s")
        bar.update(task, description="drawing the plots")
        _plot(folder, rows, names, reports)

    result = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "runs": [asdict(run) for run in runs],
        "images": images,
        "steps": steps,
        "seed": seed,
    }
    text_report = json.dumps(result, indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text_report, encoding="utf-8")
    console.print(table(runs, images))
    console.print(explanation(runs), highlight=False)
    for file, what in (
        ("grid.png", "the pictures"),
        ("layers.png", "each layer's error"),
        ("report.json", "the table's numbers"),
    ):
        console.print(f"{what}: {folder / file}", highlight=False)
    return result


def _config(name: str, seed: int, method: str = "permuquant-h") -> QuantConfig:
    return QuantConfig(
        name, GROUP_SIZE, method=method, calibration_rows=CALIBRATION_ROWS, seed=seed
    )


def _calibrate(model: nn.Module, seed: int, tick: Callable[[int, int], None]) -> Statistics:
    """Run the float model on the calibration prompts, which share none with the demo's."""
    prompts = load_prompts("calibration").take(CALIBRATION_IMAGES)
    quantizer = prepare(model, _config(FORMATS[0], seed))
    with quantizer.calibrate():
        sample(model, prompts.embeddings, CALIBRATION_STEPS, seed + _OTHER_NOISE, progress=tick)
    return quantizer.statistics()


def _velocity_points(
    pictures: torch.Tensor, seed: int, device: str
) -> list[tuple[torch.Tensor, float]]:
    """Inputs ``x_t = (1 - t) x0 + t noise`` around the float model's own pictures x0 (in -1..1)."""
    x0 = pictures * 2 - 1
    other = noise(len(x0), seed + _OTHER_NOISE)
    return [(((1 - t) * x0 + t * other).to(device), t) for t in VELOCITY_TIMES]


@torch.no_grad()
def _velocity(model: nn.Module, x: torch.Tensor, t: float, text: torch.Tensor) -> torch.Tensor:
    return velocity(model, x, t, text).double()


def _plot(
    folder: Path,
    rows: Sequence[tuple[str, torch.Tensor]],
    names: Sequence[str],
    reports: dict[tuple[str, str], Report],
) -> None:
    grid(
        folder / "grid.png",
        rows,
        names,
        title="One model, one noise; weights and activations quantized",
    )
    name = FORMATS[0]
    before = {layer.fqn: layer.error_after for layer in reports[name, "rtn"].layers}
    after = {layer.fqn: layer.error_after for layer in reports[name, "permuquant-h"].layers}
    measured = [
        (fqn, b, a)
        for fqn, b in before.items()
        if b is not None and (a := after.get(fqn)) is not None
    ]
    layer_errors(
        folder / "layers.png",
        [fqn for fqn, _, _ in measured],
        [b for _, b, _ in measured],
        [a for _, _, a in measured],
        before_label=METHODS["rtn"],
        after_label=METHODS["permuquant-h"],
        title=f"{name} g{GROUP_SIZE}, weights and activations",
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<38}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log file gets one line a run instead
    )


def _ticker(bar: Progress, task: Any) -> Callable[[int, int], None]:
    return lambda done, total: bar.advance(task)


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.device(device).type
