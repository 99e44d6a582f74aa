"""Time of the fused norm and activation kernels, with and without reorder and rotation.

    python bench/bench_norm_quantize.py --out bench/results/norm_quantize_h100.json

Medians of triton's `do_bench` (the cache is flushed between runs), microseconds; the floor is bytes
read plus written over the measured bandwidth of a device-to-device copy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from pq_fx.kernels.activation_quantize import act_quantize
from pq_fx.kernels.norm_quantize import norm_quantize


def microseconds(call: Callable[[], object]) -> float:
    return round(1000.0 * float(do_bench(call, warmup=10, rep=60, return_mode="median")), 2)


def copy_bandwidth() -> float:
    """Bytes a microsecond of a device-to-device copy, read plus written."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * source.numel() / microseconds(lambda: target.copy_(source))


def variants(key: str, rows: int, channels: int) -> dict[str, float]:
    """Time of each form of the two kernels on x [rows, channels] bf16."""
    group = int(key.split(":")[1]) or 64
    x = torch.randn(1, rows, channels, device="cuda").bfloat16()
    scale, shift = torch.randn(1, 2 * channels, device="cuda").bfloat16().chunk(2, dim=-1)
    perm = torch.randperm(channels, device="cuda").int()
    glob = torch.tensor(0.01, device="cuda") if key.startswith("nvfp4") else None
    times = {"copy bf16": microseconds(lambda: torch.empty_like(x).copy_(x))}
    for label, p, rotation, chip in (
        ("plain", None, 0, True),
        ("reorder on chip", perm, 0, True),
        ("reorder by loads", perm, 0, False),
        ("rotate", None, group, True),
        ("reorder on chip + rotate", perm, group, True),
        ("reorder by loads + rotate", perm, group, False),
    ):
        for carrier in ("e4m3", "codes"):
            if carrier == "codes" and label not in ("plain", "reorder on chip + rotate"):
                continue

            def norm(p=p, rotation=rotation, chip=chip, carrier=carrier):  # type: ignore[no-untyped-def]
                return norm_quantize(
                    x, "layer", None, None, 1e-6, scale, shift, p, glob, key, rotation, carrier,
                    on_chip=chip,
                )  # fmt: skip

            def act(p=p, rotation=rotation, chip=chip, carrier=carrier):  # type: ignore[no-untyped-def]
                return act_quantize(
                    x, None, "gelu_tanh", p, glob, key, rotation, carrier, on_chip=chip
                )

            times[f"norm {carrier} {label}"] = microseconds(norm)
            times[f"gelu {carrier} {label}"] = microseconds(act)
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
