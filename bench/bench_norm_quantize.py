"""Time of the fused norm and activation kernels, with and without reorder and rotation.

    python bench/bench_norm_quantize.py --out bench/results/norm_quantize_h100.json

Device time a call in microseconds (`timing.device_microseconds`); the floor is bytes read plus
written over the measured bandwidth of a device-to-device copy.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import triton
from timing import copy_bandwidth, device_microseconds, host_microseconds

from pq_fx.kernels.activation_quantize import act_quantize
from pq_fx.kernels.norm_quantize import norm_quantize

L2_BYTES = 200e6


def variants(key: str, rows: int, channels: int) -> dict[str, float]:
    """Time of each form of the two kernels on x [rows, channels] bf16."""
    group = int(key.split(":")[1]) or 64
    sets = max(1, round(L2_BYTES / (rows * channels * 3)))
    xs = [torch.randn(1, rows, channels, device="cuda").bfloat16() for _ in range(sets)]
    scale, shift = torch.randn(1, 2 * channels, device="cuda").bfloat16().chunk(2, dim=-1)
    perm = torch.randperm(channels, device="cuda").int()
    glob = torch.tensor(0.01, device="cuda") if key.startswith("nvfp4") else None
    times = {"copy bf16": device_microseconds([partial(torch.clone, x) for x in xs])}
    for label, p, rotation in (
        ("plain", None, 0),
        ("reorder", perm, 0),
        ("rotate", None, group),
        ("reorder + rotate", perm, group),
    ):
        tail = (p, glob, None, key, rotation, "e4m3")
        norms = [
            partial(norm_quantize, x, "layer", None, None, 1e-6, scale, shift, *tail) for x in xs
        ]
        acts = [partial(act_quantize, x, None, "gelu_tanh", None, *tail) for x in xs]
        times[f"norm {label}"] = device_microseconds(norms)
        times[f"gelu {label}"] = device_microseconds(acts)
        if label == "plain":
            times["norm plain, host"] = host_microseconds(norms[0])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", nargs="*", default=["int4:64:bf16", "mxfp4:32:e8m0"])
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    results = []
    for key in args.keys:
        for rows, channels in ((4096, 3072), (4096, 12288)):
            times = variants(key, rows, channels)
            floor = round(rows * channels * 3 / bandwidth, 2)
            results.append(
                {"format": key, "rows": rows, "channels": channels, "floor_us": floor, "us": times}
            )
            print(f"{key} {rows}x{channels}, floor {floor} us")
            for label, time in times.items():
                print(f"  {label:40s} {time:8.1f}")
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_us": round(bandwidth),
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
