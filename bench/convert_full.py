"""How long quantizing a full-size transformer takes beyond its forward calls, and how much memory.

    python bench/convert_full.py --device cuda --out bench/results/convert_flux_h100.json

FLUX.1-dev (19 + 38 blocks, random weights with planted outlier channels, random inputs of `--side` pixels). The float
forward is timed by itself, then calibration of `--calls` calls (its first traces the model), then the conversion by
each method on a fresh model. Peaks are of allocated memory, above the float model's weights; `held_before_gib` of
them are there before (cuBLAS's workspace, the inputs, what calibration gathered).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from step_models import build, step_inputs
from torch import nn

import pq_fx

GIB = 2**30


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


class Peak:
    """The device's peak of allocated memory while open, in GiB above `base` bytes; None on a CPU."""

    def __init__(self, device: str, base: int) -> None:
        self.cuda, self.base = device == "cuda", base
        self.above: float | None = None
        self.before: float | None = None

    def __enter__(self) -> Peak:
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = round((torch.cuda.memory_allocated() - self.base) / GIB, 3)
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - self.base
            self.above = round(peak / GIB, 3)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the file is written after every step."""
    cuda = args.device == "cuda"
    inputs = step_inputs(args.model, args.side, 1, args.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else args.device,
        "torch": torch.__version__,
        "model": args.model,
        "layers": args.layers,
        "side": args.side,
        "format": args.format,
        "calls": args.calls,
        "beside": args.beside,
        "convert": [],
    }

    def note(**found: Any) -> None:
        result.update(found)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(found), flush=True)

    model = build(args.model, args.layers, args.tiny, args.device)
    model(**inputs)
    _synchronize(args.device)
    with Peak(args.device, _weights(model)) as alone:
        start = time.perf_counter()
        for _ in range(args.calls):
            model(**inputs)
        _synchronize(args.device)
        forward = time.perf_counter() - start
    with Peak(args.device, _weights(model)) as calibrating:
        start = time.perf_counter()
        quantizer = pq_fx.prepare(model, pq_fx.QuantConfig(args.format))
        with quantizer.calibrate(progress=False):
            for _ in range(args.calls):
                model(**inputs)
        _synchronize(args.device)
        calibrate = time.perf_counter() - start
    note(
        forward_s=round(forward, 2),
        calibrate_beyond_forward_s=round(calibrate - forward, 2),
        forward_peak_above_float_gib=alone.above,
        calibrate_peak_above_float_gib=calibrating.above,
    )
    statistics = quantizer.statistics()
    for method in args.methods:
        del model, quantizer
        torch.compiler.reset()
        gc.collect()
        model = build(args.model, args.layers, args.tiny, args.device)
        config = pq_fx.QuantConfig(args.format, method=method)
        quantizer = pq_fx.prepare(model, config, statistics=statistics)
        stages: list[float] = []
        start = time.perf_counter()

        done_row: dict[str, Any] = {"method": method}

        def progress(
            done: int,
            total: int,
            start: float = start,
            s: list[float] = stages,
            row: dict[str, Any] = done_row,
        ) -> None:
            _synchronize(args.device)
            s.append(time.perf_counter() - start)
            if done % 10 == 0 or done == total:  # a run that is cut off leaves its rate
                row |= {"done": done, "of": total, "seconds": round(s[-1], 1)}
                note(going=row)

        with Peak(args.device, _weights(model)) as converting:
            report = quantizer.convert(progress)
        chosen = stages[len(stages) // 2 - 1]
        row = {
            "method": method,
            "convert_s": round(report.seconds, 1),
            "choose_s": round(chosen, 1),
            "pack_s": round(stages[-1] - chosen, 1),
            "peak_above_float_gib": converting.above,
            "held_before_gib": converting.before,
            "layer_error": round(report.mean_layer_error, 5),
        }
        largest = max(r.in_features * r.out_features for r in report.quantized)
        row["largest_linear_gib"] = round(2 * largest / GIB, 3)
        result.pop("going")
        note(convert=[*result["convert"], row])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="flux.1-dev")
    parser.add_argument("--layers", nargs="+", type=int, help="blocks of each kind, to shorten")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks, to try the script")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--methods", nargs="+", default=("permuquant-h", "best"))
    parser.add_argument(
        "--beside", default="nothing", help="what else ran on the device, for the record"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
