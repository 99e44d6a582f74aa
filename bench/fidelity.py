"""How close a quantized model stays to the float one: methods x formats on the trained demo models.

    python bench/fidelity.py --arch flux --images 256 --device cuda --out bench/results/fidelity_flux.json

One calibration (prompts and noise that no picture uses) serves all variants; every variant draws the same prompts from
the same noise. Recorded for each: PSNR and structural distance of the pictures against the float model's (mean, 95 %
interval by bootstrap over pictures), velocity relative MSE by time at equal inputs, mean layer error on held-out rows.
FID is left out: it does not separate 4-bit methods.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pq_fx
from pq_fx.demo import load_model, load_prompts, psnr, sample, velocity
from pq_fx.demo.sampling import noise

TIMES = (0.95, 0.8, 0.5, 0.2, 0.05)
METHODS = ("rtn", "convrot", "permuquant", "permuquant-h", "best")
FORMATS = ("int4", "int3", "nvfp4", "mxfp4")


def structural_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM over three scales (Wang et al. 2003, uniform 7x7 windows), fp64 [n]; pictures [n, 3, H, W] in 0..1."""
    a, b = a.double(), b.double()
    scores = []
    for _ in range(3):
        mean = torch.nn.functional.avg_pool2d
        ma, mb = mean(a, 7, 1), mean(b, 7, 1)
        va, vb = mean(a * a, 7, 1) - ma * ma, mean(b * b, 7, 1) - mb * mb
        cov = mean(a * b, 7, 1) - ma * mb
        ssim = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)) / (
            (ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4)
        )
        scores.append(ssim.flatten(1).mean(1))
        a, b = mean(a, 2), mean(b, 2)
    return 1.0 - torch.stack(scores).mean(0)


def interval(values: Tensor, seed: int = 0) -> list[float]:
    """[mean, low, high]: the mean and its 95 % bootstrap interval over 2,000 resamples."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (2000, len(values)), generator=generator)
    means = values[picks].mean(1).sort().values
    return [round(float(v), 5) for v in (values.mean(), means[49], means[1949])]


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(args.arch).to(args.device)
    demo = load_prompts("demo").take(args.images).embeddings
    calibration = load_prompts("calibration").take(args.calibration).embeddings
    quantizer = pq_fx.prepare(model, pq_fx.QuantConfig("int4", calibration_rows=args.rows))
    start = time.perf_counter()
    with quantizer.calibrate():
        sample(model, calibration, 8, 7919)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "arch": args.arch,
        "images": args.images,
        "steps": args.steps,
        "calibration_prompts": args.calibration,
        "calibration_rows": args.rows,
        "calibrate_s": round(time.perf_counter() - start, 1),
        "times": TIMES,
        "runs": [],
    }
    size = 16 if args.device == "cpu" else 64
    pictures = sample(model, demo, args.steps, 0, batch_size=size)
    few = min(args.images, 32)
    x0 = (pictures[:few] * 2 - 1).to(args.device)
    other = noise(few, 4242).to(args.device)
    text = demo[:few].to(args.device)
    points = [((1 - t) * x0 + t * other, t) for t in TIMES]
    wanted = [velocity(model, x, t, text).double() for x, t in points]
    for fmt in args.formats:
        for method in args.methods:
            clone = copy.deepcopy(model)
            config = pq_fx.QuantConfig(fmt, method=method, calibration_rows=args.rows)
            report = pq_fx.prepare(clone, config, statistics=quantizer.statistics()).convert()
            drawn = sample(clone, demo, args.steps, 0, batch_size=size)
            if not torch.isfinite(drawn).all():
                sys.exit(f"{fmt} {method}: pictures are not finite")
            errors = [
                float((velocity(clone, x, t, text).double() - v).square().sum() / v.square().sum())
                for (x, t), v in zip(points, wanted, strict=True)
            ]
            row = {
                "format": config.weight.key,
                "method": method,
                "psnr_db": interval(psnr(drawn, pictures)),
                "structural_distance": interval(structural_distance(drawn, pictures)),
                "velocity_rel_mse": round(sum(errors) / len(errors), 6),
                "velocity_rel_mse_by_time": [round(e, 6) for e in errors],
                "layer_error": round(report.mean_layer_error, 6),
                "weight_bytes": report.weight_bytes,
                "convert_s": round(report.seconds, 1),
            }
            result["runs"].append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(result: dict[str, Any]) -> Table:
    """The result as a table."""
    out = Table(
        title=f"{result['arch']}: {result['images']} pictures x {result['steps']} steps, {result['device']}"
    )
    for name in (
        "format",
        "method",
        "PSNR dB (95 %)",
        "1 - SSIM",
        "velocity rel. MSE",
        "layer error",
    ):
        out.add_column(name)
    for r in result["runs"]:
        mean, low, high = r["psnr_db"]
        out.add_row(
            r["format"],
            r["method"],
            f"{mean:.2f} ({low:.2f} to {high:.2f})",
            f"{r['structural_distance'][0]:.4f}",
            f"{r['velocity_rel_mse']:.5f}",
            f"{r['layer_error']:.5f}",
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=("flux", "zimage"), default="flux")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--calibration", type=int, default=32, help="prompts")
    parser.add_argument("--rows", type=int, default=1024, help="rows kept of each linear's input")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    Console().print(table(run(parser.parse_args())))


if __name__ == "__main__":
    main()
