"""How close a quantized model stays to the float one: methods x formats on the trained demo models.

    python bench/fidelity.py --arch flux --images 256 --device cuda --out bench/results/fidelity_flux.json

One calibration (prompts and noise that no picture uses) serves all variants; every variant draws
the same prompts from the same noise. For each variant: PSNR and structural distance of the pictures
against the float model's, velocity relative MSE by time at equal inputs, mean layer error on
held-out rows; median or mean with 95 % bootstrap intervals over pictures. Rankings are PAIRED
differences on the same pictures, with intervals. FID is left out: it does not separate 4-bit methods.
The file is written after every variant.
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
from torch import Tensor, nn

import pq_fx
from pq_fx.demo import load_model, load_prompts, psnr, sample, velocity
from pq_fx.demo.sampling import noise
from pq_fx.picture_distance import structural_distance

sys.path.insert(0, str(Path(__file__).resolve().parent))
from statistics_of_pictures import bootstrap, ratio_bootstrap

TIMES = (0.95, 0.8, 0.5, 0.2, 0.05)
# "best" as it was before int4f and int3f.
SYMMETRIC = "best without full_range"
ALL = ("rtn", "convrot", "permuquant", "permuquant-h", "best", SYMMETRIC)
OTHERS = ("smoothquant", "svdquant")
# (weights, activations, methods), the most important first.
VARIANTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("int4", "same", ALL),
    ("int3", "same", ALL),
    ("nvfp4", "same", ("rtn", "permuquant", "permuquant-h", "best")),
    ("int4", "same", OTHERS),
    ("int3", "same", OTHERS),
    ("mxfp4", "same", ("rtn", "permuquant-h", "best")),
    ("int4", "fp8", ("rtn", "permuquant", "permuquant-h", "best", SYMMETRIC)),
    ("int4f", "same", ("permuquant-h", "rtn")),
    ("int3f", "same", ("permuquant-h", "rtn")),
    ("nvfp4", "same", ("convrot", *OTHERS)),
)
FORMATS = tuple(dict.fromkeys(weights for weights, *_ in VARIANTS))
PAIRS = (
    ("rtn", "permuquant"),
    ("permuquant", "permuquant-h"),
    ("convrot", "permuquant-h"),
    ("permuquant-h", "best"),
    ("permuquant-h", SYMMETRIC),
    (SYMMETRIC, "best"),
)


class Pictures:
    """The float model's pictures and velocities, and a quantized model's distance to them."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.text = load_prompts("demo").take(args.images).embeddings
        self.steps, self.batch = args.steps, 16 if args.device == "cpu" else 128
        self.drawn = sample(model, self.text, args.steps, 0, batch_size=self.batch)
        few = min(args.images, 32 if args.device == "cpu" else 128)
        x0, other = (self.drawn[:few] * 2 - 1).to(args.device), noise(few, 4242).to(args.device)
        self.points = [((1 - t) * x0 + t * other, t) for t in TIMES]
        self.few = self.text[:few].to(args.device)
        self.wanted = [velocity(model, x, t, self.few).double() for x, t in self.points]

    def distances(self, model: nn.Module) -> dict[str, Tensor]:
        """psnr [n], structural [n], velocity fp64 [times, few]."""
        drawn = sample(model, self.text, self.steps, 0, batch_size=self.batch)
        if not torch.isfinite(drawn).all():
            sys.exit("pictures are not finite")
        errors = []
        for (x, t), v in zip(self.points, self.wanted, strict=True):
            lost = (velocity(model, x, t, self.few).double() - v).square().flatten(1).sum(1)
            errors.append(lost.cpu() / v.square().flatten(1).sum(1).mean().cpu())
        return {
            "psnr": psnr(drawn, self.drawn),
            "structural": structural_distance(drawn, self.drawn),
            "velocity": torch.stack(errors),
        }


def calibrated(model: nn.Module, args: argparse.Namespace, seed: int = 7919, steps: int = 8) -> Any:
    """Statistics of the float model on the calibration prompts."""
    config = pq_fx.QuantConfig("int4", calibration_rows=args.rows)
    quantizer = pq_fx.prepare(model, config)
    prompts = load_prompts("calibration").take(args.calibration).embeddings
    with quantizer.calibrate():
        sample(model, prompts, steps, seed, batch_size=32)
    return quantizer.statistics()


def settings_of(method: str) -> dict[str, Any]:
    """The settings that a method's name in the tables stands for."""
    if method == SYMMETRIC:
        return {"method": "best", "parts": {"full_range": False}}
    return {"method": method}


def row_of(found: dict[str, Tensor], report: pq_fx.Report) -> dict[str, Any]:
    """What is recorded of a variant."""
    return {
        "psnr_db": bootstrap(found["psnr"]),
        "psnr_db_median": bootstrap(found["psnr"], median=True),
        "structural_distance": bootstrap(found["structural"]),
        "structural_distance_median": bootstrap(found["structural"], median=True),
        "velocity_rel_mse": bootstrap(found["velocity"].mean(0)),
        "velocity_rel_mse_by_time": [round(float(e), 6) for e in found["velocity"].mean(1)],
        "layer_error": round(report.mean_layer_error, 6),
        "weight_bytes": report.weight_bytes,
        "reordered_at_run_time": sum(r.absorb in ("norm", "quantize") for r in report.quantized),
        "convert_s": round(report.seconds, 2),
    }


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every variant; see the module's docstring."""
    model = load_model(args.arch).to(args.device)
    start = time.perf_counter()
    statistics = calibrated(model, args)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "arch": args.arch,
        "images": args.images,
        "steps": args.steps,
        "calibration_prompts": args.calibration,
        "calibration_rows": args.rows,
        "calibrate_s": round(time.perf_counter() - start, 1),
        "times": TIMES,
        "runs": [],
        "pairs": [],
    }
    pictures = Pictures(model, args)
    known: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for weights, activations, methods in VARIANTS:
        if weights not in args.formats:
            continue
        for method in methods:
            if method not in args.methods:
                continue
            clone = copy.deepcopy(model)
            config = pq_fx.QuantConfig(
                weights,
                activation_format=activations,
                **settings_of(method),
                calibration_rows=args.rows,
            )
            report = pq_fx.prepare(clone, config, statistics=statistics).convert()
            found = pictures.distances(clone)
            known[weights, activations, method] = found
            assert config.activation is not None
            row = {"weights": config.weight.key, "activations": config.activation.key}
            result["runs"].append(row | {"method": method} | row_of(found, report))
            result["pairs"] = pairs(known)
            print(json.dumps(result["runs"][-1]), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def pairs(known: dict[tuple[str, str, str], dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Second method minus first, on the same pictures."""
    found = []
    for weights, activations in dict.fromkeys((w, a) for w, a, _ in known):
        for first, second in PAIRS:
            a, b = (known.get((weights, activations, m)) for m in (first, second))
            if a is None or b is None:
                continue
            found.append(
                {
                    "weights": weights,
                    "activations": activations,
                    "first": first,
                    "second": second,
                    "psnr_db": bootstrap(b["psnr"] - a["psnr"]),
                    "structural_distance": bootstrap(b["structural"] - a["structural"]),
                    "velocity_rel_mse_ratio": ratio_bootstrap(
                        a["velocity"].mean(0), b["velocity"].mean(0)
                    ),
                }
            )
    return found


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(result: dict[str, Any]) -> Table:
    """The variants as a table."""
    title = f"{result['arch']}: {result['images']} pictures x {result['steps']} steps, {result['device']}"
    out = Table(title=title)
    for name in ("weights", "input", "method", "PSNR dB (95 %)", "1 - SSIM", "velocity", "layer"):
        out.add_column(name)
    for r in result["runs"]:
        mean, low, high = r["psnr_db"]
        out.add_row(
            r["weights"],
            r["activations"],
            r["method"],
            f"{mean:.2f} ({low:.2f} to {high:.2f})",
            f"{r['structural_distance'][0]:.4f}",
            f"{r['velocity_rel_mse'][0]:.5f}",
            f"{r['layer_error']:.5f}",
        )
    return out


def ranking(result: dict[str, Any]) -> Table:
    """The paired differences as a table; an interval that holds 0 decides nothing."""
    out = Table(
        title=f"{result['arch']}: second against first on the same pictures, 95 % intervals"
    )
    for name in ("formats", "first", "second", "PSNR dB", "velocity error"):
        out.add_column(name)
    for p in result["pairs"]:
        mean, low, high = p["psnr_db"]
        change, least, most = (100 * v for v in p["velocity_rel_mse_ratio"])
        out.add_row(
            f"{p['weights']} x {p['activations']}",
            p["first"],
            p["second"],
            f"{mean:+.2f} ({low:+.2f} to {high:+.2f})",
            f"{change:+.1f} % ({least:+.1f} to {most:+.1f})",
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
    parser.add_argument("--methods", nargs="+", default=(*ALL, *OTHERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    result = run(parser.parse_args())
    Console(width=150).print(table(result), ranking(result))


if __name__ == "__main__":
    main()
