"""Time of the fused norm and activation kernels at FLUX.1-dev's rows, with and without reorder and rotation.

    python bench/bench_norm_quantize.py --out bench/results/norm_quantize_h100.json

Device time a call in microseconds (`timing.device_microseconds`); the floor is bytes read plus
written over the measured bandwidth of a device-to-device copy. Carrier "e4m3".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import copy_bandwidth, device_microseconds, host_microseconds, made_with

from pq_fx.kernels.activation_quantize import act_quantize
from pq_fx.kernels.norm_quantize import norm_quantize

L2_BYTES = 200e6
# What is fused before the quantizer, rows, channels, channels that come before the activation's.
ROWS = (
    ("norm", 4608, 3072, 0),
    ("none", 4608, 3072, 0),
    ("gelu_tanh", 4096, 12288, 0),
    ("gelu_tanh", 4608, 15360, 3072),
)


def calls_of(
    kind: str, rows: int, channels: int, first: int, tail: tuple[Any, ...]
) -> list[Callable[[], object]]:
    """Calls on fresh inputs, enough of them that they come from memory."""
    sets = max(1, round(L2_BYTES / (rows * channels * 3)))
    scale, shift = torch.randn(1, 2 * channels, device="cuda").bfloat16().chunk(2, dim=-1)
    calls: list[Callable[[], object]] = []
    for _ in range(sets):
        x = torch.randn(1, rows, channels - first, device="cuda").bfloat16()
        if kind == "norm":
            calls.append(partial(norm_quantize, x, "layer", None, None, 1e-6, scale, shift, *tail))
        else:
            before = torch.randn(1, rows, first, device="cuda").bfloat16() if first else None
            calls.append(partial(act_quantize, x, None, kind, before, *tail))
    return calls


def variants(key: str, kind: str, rows: int, channels: int, first: int) -> dict[str, float]:
    """Time of each form of one kernel on x [rows, channels] bf16."""
    group = int(key.split(":")[1]) or 64
    perm = torch.randperm(channels, device="cuda").int()
    glob = torch.tensor(0.01, device="cuda") if key.startswith("nvfp4") else None
    times = {}
    for label, p, rotation in (
        ("plain", None, 0),
        ("reorder", perm, 0),
        ("rotate", None, group),
        ("reorder + rotate", perm, group),
    ):
        calls = calls_of(kind, rows, channels, first, (p, glob, None, key, rotation, "e4m3"))
        times[label] = device_microseconds(calls)
        if label == "plain":
            times["plain, host"] = host_microseconds(calls[0])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", nargs="*", default=["int4:64:bf16", "mxfp4:32:e8m0"])
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        **made_with(),
        "copy_bytes_per_us": round(bandwidth),
        "results": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for key in args.keys:
        for kind, rows, channels, first in ROWS:
            floor = round(rows * channels * 3 / bandwidth, 2)
            times = variants(key, kind, rows, channels, first)
            row = {"format": key, "kind": kind, "rows": rows, "channels": channels}
            result["results"].append({**row, "before": first, "floor_us": floor, "us": times})
            print(f"{key} {kind} {rows}x{channels}, floor {floor} us: {times}", flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
