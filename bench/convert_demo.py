"""How long calibrating and converting the demo's model takes on a few CPU cores, with the demo's own settings.

    python bench/convert_demo.py --cores 2 --out bench/results/convert_demo_cpu.json

The calibration is that of `make demo` (16 prompts x 8 steps, 1,024 rows), its forward calls included, then one
conversion by each method. Wall seconds, and the process's CPU seconds, which tell what other work on the machine cost.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import pq_fx
from pq_fx.demo import load_model
from pq_fx.demo.run import CALIBRATION_ROWS, _calibrate


def _seconds() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> dict[str, float]:
    wall, cpu = (now - then for now, then in zip(_seconds(), start, strict=True))
    return {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the file is written after every step."""
    cores = sorted(os.sched_getaffinity(0))[-args.cores :]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(args.cores)
    model = load_model("flux")
    start = _seconds()
    statistics = _calibrate(model, 0, lambda *_: None)
    result: dict[str, Any] = {
        "device": "cpu",
        "cores": args.cores,
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "calibrate": _since(start),
        "convert": [],
    }
    for fmt in args.formats:
        for method in args.methods:
            config = pq_fx.QuantConfig(fmt, method=method, calibration_rows=CALIBRATION_ROWS)
            clone = copy.deepcopy(model)
            start = _seconds()
            pq_fx.prepare(clone, config, statistics=statistics).convert()
            result["convert"].append({"format": fmt, "method": method} | _since(start))
            print(json.dumps(result["convert"][-1]), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--formats", nargs="+", default=("int4", "int3"))
    parser.add_argument("--methods", nargs="+", default=("permuquant-h", "best"))
    parser.add_argument("--out", type=Path, required=True)
    print(json.dumps(run(parser.parse_args())["calibrate"]))


if __name__ == "__main__":
    main()
