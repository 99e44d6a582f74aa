"""Time and memory of choosing and of rounding one region, at the sizes of FLUX.1-dev.

    python bench/bench_choose.py --out bench/results/choose_h100.json

Synthetic activations with channels of unlike size, random weights. Prints seconds a region and what
the whole model would take (19 double and 38 single blocks).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from pq_fx.kernels.formats import get_format
from pq_fx.kernels.reference import WEIGHT_CLIP_RATIOS, fake_quantize, permute_rotate
from pq_fx.passes.choose import Settings, choose
from pq_fx.passes.moments import Moments
from pq_fx.passes.observe import observe
from pq_fx.passes.regions import Point, Region
from pq_fx.passes.rounding import gptq, second_moment

# (what, channels K, outputs N of each linear of the region, how many such regions FLUX.1-dev has)
REGIONS = (
    ("double: q, k, v", 3072, (3072, 3072, 3072), 38),
    ("double: attention out", 3072, (3072,), 38),
    ("double: MLP in", 3072, (12288,), 38),
    ("double: MLP out", 12288, (3072,), 38),
    ("single: q, k, v, MLP in", 3072, (3072, 3072, 3072, 12288), 38),
    ("single: out", 15360, (3072,), 38),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, to try it out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, fmt = torch.device(args.device), get_format(args.format)
    result = {"device": str(device), "torch": torch.__version__, "format": fmt.key, "regions": []}
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
    for what, channels, outputs, count in REGIONS:
        k, ns = channels // args.shrink, [n // args.shrink for n in outputs]
        row = measure(k, ns, args.rows, fmt, device)
        result["regions"].append({"region": what, "K": k, "N": ns, "count": count, **row})
        print(result["regions"][-1], flush=True)
    for key in ("observe_s", "choose_s", "gptq_s"):
        result[key] = sum(r[key] * r["count"] for r in result["regions"])
        print(f"whole model, {key}: {result[key]:.1f}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(k: int, ns: list[int], rows: int, fmt, device: torch.device) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(0)
    size = torch.randn(k, generator=generator, device=device).mul(0.8).exp()
    x = torch.randn(4608, k, generator=generator, device=device, dtype=torch.bfloat16) * size
    weights = {
        f"w{i}": torch.randn(n, k, generator=generator, device=device, dtype=torch.bfloat16) / 50
        for i, n in enumerate(ns)
    }
    moments = Moments.create(k, rows, device, torch.bfloat16)
    observe(x, *moments.tensors(), 0)
    row = {"observe_s": timed(lambda: observe(x, *moments.tensors(), 0), device)}
    point = Point("w0", tuple(weights), k, "norm", False)
    region = Region("w0", (point,), np.zeros(k, np.int64), {"w0": np.arange(k)})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def run_choose() -> None:
        nonlocal choice
        choice = choose(region, {"w0": moments}, weights, Settings(fmt, fmt))

    choice = None
    row["choose_s"] = timed(run_choose, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    row["choose_peak_mib"] = (peak - before) / 2**20

    def run_gptq() -> None:
        seen = fake_quantize(permute_rotate(moments.sample().float(), None, 64), fmt)
        moment = second_moment(seen, group=fmt.group_size)
        for weight in weights.values():
            gptq(permute_rotate(weight, None, 64), moment, fmt, scale_search=WEIGHT_CLIP_RATIOS)

    row["gptq_s"] = timed(run_gptq, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    row["gptq_peak_mib"] = (peak - before) / 2**20
    return row


def timed(f, device: torch.device) -> float:
    best = float("inf")
    for _ in range(2):  # the first one also loads kernels
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return round(best, 4)


if __name__ == "__main__":
    main()
