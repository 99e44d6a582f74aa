"""Does what calibration chose hold on timesteps and prompts that it never saw?

    python bench/generalisation.py --device cuda --out bench/results/generalisation.json

Measured is the velocity's relative MSE on the demo prompts, at given times. Calibration varies:

    times      on the test's times / on times between them
    prompts    on the test's own prompts / on others
    size       4 to 256 prompts, 5 seeds each (which prompts, noise and rows)
    accept     the held-out acceptance test on / off
    alpha      searched / fixed at 0.5

The part of the gain that is lost is (e_other - e_same) / (e_rtn - e_same). The file is written after
every measurement. Seeds may run as processes of their own (`--seeds 3 --out seed3.json`), joined by `--more`;
`--plot docs/generalisation.png --more flux.json zimage.json` draws files, a row each.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pq_fx
from pq_fx.calibrate import Statistics
from pq_fx.demo import load_model, load_prompts, sample, velocity
from pq_fx.demo.sampling import noise

SEEN = (0.95, 0.7, 0.45, 0.2)
UNSEEN = (0.85, 0.575, 0.325, 0.1)
SIZES = (4, 16, 64, 256)
ROWS = 1024


class Bench:
    """One model, its test inputs, and the file that results go to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        self.model = load_model(args.arch).to(args.device)
        self.test = load_prompts("demo").take(args.test).embeddings
        self.others = load_prompts("calibration").embeddings
        self.pictures = self.draw(self.test, 0)
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "torch": torch.__version__,
            "arch": args.arch,
            "format": args.format,
            "test_prompts": args.test,
            "seen": SEEN,
            "unseen": UNSEEN,
            "rows": ROWS,
            "runs": [],
        }

    def draw(self, text: Tensor, seed: int) -> Tensor:
        """The float model's pictures in -1..1."""
        batch = 16 if self.args.device == "cpu" else 128
        return sample(self.model, text, 8, seed, batch_size=batch) * 2 - 1

    def inputs(
        self, pictures: Tensor, text: Tensor, times: tuple[float, ...], seed: int
    ) -> list[tuple[Tensor, float, Tensor]]:
        """(x_t, t, text) at each time."""
        other = noise(len(pictures), seed)
        device = self.args.device
        return [(((1 - t) * pictures + t * other).to(device), t, text.to(device)) for t in times]

    def calibrate(
        self, text: Tensor, pictures: Tensor, times: tuple[float, ...], seed: int
    ) -> Statistics:
        """Statistics of the float model at these times."""
        config = pq_fx.QuantConfig("int4", calibration_rows=ROWS, seed=seed)
        quantizer = pq_fx.prepare(self.model, config)
        with quantizer.calibrate():
            for x, t, part in self.inputs(pictures, text, times, 1000 + seed):
                for first in range(0, len(x), 64):
                    velocity(self.model, x[first : first + 64], t, part[first : first + 64])
        return quantizer.statistics()

    def error(self, model: nn.Module, times: tuple[float, ...]) -> float:
        """Mean over times of the velocity's relative MSE on the test prompts."""
        found = []
        for x, t, text in self.inputs(self.pictures, self.test, times, 4242):
            wanted = velocity(self.model, x, t, text).double()
            lost = (velocity(model, x, t, text).double() - wanted).square().sum()
            found.append(float(lost / wanted.square().sum()))
        return sum(found) / len(found)

    def record(self, statistics: Statistics, what: dict[str, Any], **settings: Any) -> None:
        """Convert with these statistics and note the errors."""
        clone = copy.deepcopy(self.model)
        config = pq_fx.QuantConfig(self.args.format, calibration_rows=ROWS, **settings)
        report = pq_fx.prepare(clone, config, statistics=statistics).convert()
        row = what | {
            "method": config.method,
            "seen": round(self.error(clone, SEEN), 6),
            "unseen": round(self.error(clone, UNSEEN), 6),
            "layer_error": round(report.mean_layer_error, 6),
            "seconds": round(time.perf_counter() - self.start, 1),
        }
        self.result["runs"].append(row)
        print(json.dumps(row), flush=True)
        self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, the most important first, until the time is up."""
    bench = Bench(args)

    def picked(size: int, seed: int) -> Tensor:
        order = torch.randperm(len(bench.others), generator=torch.Generator().manual_seed(seed))
        return bench.others[order[:size]]

    if args.sizes:
        return run_sizes(bench, picked)
    for seed in args.seeds:
        sets = {
            "other prompts": picked(64, seed),
            "same prompts": bench.test[:64],
        }
        for name, text in sets.items():
            pictures = bench.draw(text, 50 + seed)
            for times, which in ((SEEN, "seen"), (UNSEEN, "unseen"), (SEEN + UNSEEN, "all")):
                if name == "same prompts" and which != "all":
                    continue
                statistics = bench.calibrate(text, pictures, times, seed)
                for method in ("rtn", "permuquant-h", "best")[0 if seed == args.seeds[0] else 1 :]:
                    what = {"prompts": name, "times": which, "size": 64, "seed": seed}
                    bench.record(statistics, what, method=method)
                if which == "all" and name == "other prompts":
                    for part, settings in (
                        ("no acceptance", {"tau": -1.0}),
                        ("alpha 0.5", {"alphas": (0.5,)}),
                    ):
                        what = {"prompts": name, "times": which, "size": 64, "seed": seed}
                        bench.record(statistics, what | {"part": part}, **settings)
            if time.perf_counter() - bench.start > args.seconds:
                return bench.result
    return run_sizes(bench, picked)


def run_sizes(bench: Bench, picked: Callable[[int, int], Tensor]) -> dict[str, Any]:
    """Error against the number of calibration prompts."""
    args = bench.args
    rtn = "rtn" if args.sizes else None
    for seed in args.seeds:
        for size in args.sizes or SIZES:
            text = picked(size, 100 + seed)
            statistics = bench.calibrate(text, bench.draw(text, 60 + seed), SEEN, seed)
            if rtn:
                bench.record(statistics, {"times": "seen"}, method=rtn)
                rtn = None
            for method in args.methods:
                what = {"prompts": "other prompts", "times": "seen", "size": size, "seed": seed}
                bench.record(statistics, what | {"part": "size"}, method=method)
            if time.perf_counter() - bench.start > args.seconds:
                return bench.result
    return bench.result


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Parts of the gain over RTN that are lost, and changes by single settings, with the spread over seeds."""
    runs = result["runs"]
    rtn = mean([r["unseen"] for r in runs if r["method"] == "rtn"])

    def of(method: str, prompts: str, times: str, part: str | None = None) -> dict[int, float]:
        key = (method, prompts, times, part)
        return {
            r["seed"]: r["unseen"]
            for r in runs
            if r["method"] != "rtn"
            and (r["method"], r["prompts"], r["times"], r.get("part")) == key
        }

    found: dict[str, Any] = {}
    for method in ("permuquant-h", "best"):
        same = of(method, "other prompts", "unseen"), of(method, "same prompts", "all")
        other = of(method, "other prompts", "seen"), of(method, "other prompts", "all")
        for name, a, b in zip(("timesteps", "prompts"), same, other, strict=True):
            lost = [(b[s] - a[s]) / (rtn - a[s]) for s in a if s in b]
            found[f"{method}: part of the gain lost on unseen {name}"] = spread(lost)
    base = of("permuquant-h", "other prompts", "all")
    for part in ("no acceptance", "alpha 0.5"):
        own = of("permuquant-h", "other prompts", "all", part)
        changes = [own[s] / base[s] - 1 for s in own if s in base]
        found[f"permuquant-h, {part}: change of the error"] = spread(changes)
    for method in ("permuquant-h", "best"):
        for size in SIZES:
            own = [
                r["unseen"]
                for r in runs
                if r.get("part") == "size" and (r["method"], r["size"]) == (method, size)
            ]
            if own:
                found[f"{method}: error with {size} prompts"] = spread(own)
    return {"rtn": round(rtn, 6)} | found


def mean(values: list[float]) -> float:
    """Their mean; nan of none."""
    return sum(values) / len(values) if values else math.nan


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    middle = mean(values)
    deviation = math.sqrt(mean([(v - middle) ** 2 for v in values]))
    return {"mean": round(middle, 5), "std": round(deviation, 5), "seeds": len(values)}


def joined(files: list[Path]) -> dict[str, Any]:
    """The runs of several files as one result."""
    parts = [json.loads(file.read_text()) for file in files]
    return parts[0] | {"runs": [run for part in parts for run in part["runs"]]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=("flux", "zimage"), default="flux")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--test", type=int, default=64, help="prompts that are measured on")
    parser.add_argument("--sizes", nargs="+", type=int, help="measure nothing but these sizes")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--methods", nargs="+", default=("permuquant-h", "best"), help="of sizes")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--more", type=Path, nargs="*", help="join these into --out, measure nothing"
    )
    parser.add_argument("--plot", type=Path, help="draw --more, else --out; measure nothing")
    args = parser.parse_args()
    if args.plot:
        from generalisation_plot import plot

        plot([json.loads(file.read_text()) for file in args.more or [args.out]], args.plot)
        return
    if args.out is None:
        parser.error("--out is missing")
    result = joined(args.more) if args.more else run(args)
    result["summary"] = summary(result)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
