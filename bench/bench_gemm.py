"""Time of the packed-weight linears against cuBLAS in bf16 and fp8, at FLUX.1-dev's shapes.

    python bench/bench_gemm.py --out bench/results/gemm_h100.json

Device time a call in microseconds (`timing.device_microseconds`). "linear" includes the decode of
the packed weight. Few rows: several weights in turn, so that they come from memory as in a model.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import copy_bandwidth, device_microseconds, host_microseconds, made_with

from pq_fx.kernels.decode import Packed, decode_e4m3
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_fp8 import fp8_gemm, scaled_gemm
from pq_fx.kernels.gemv import gemv, linear_weight_only
from pq_fx.kernels.linear import linear
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import nvfp4_global_scale, quantize

SHAPES = (
    (4096, 9216, 3072),
    (4096, 3072, 3072),
    (4096, 12288, 3072),
    (4096, 3072, 12288),
    (4608, 21504, 3072),
    (4608, 3072, 15360),
)
Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def packed_weight(fmt: Format, n: int, k: int) -> Weight:
    w = torch.randn(n, k, device="cuda")
    glob = nvfp4_global_scale(w.abs().amax()) if fmt.two_level else None
    q = quantize(w, fmt, global_scale=glob)
    return pack(q.codes, fmt), q.scale, glob


def many_rows(keys: list[str]) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for m, n, k in SHAPES:
        xs = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(2)]
        w = torch.randn(n, k, device="cuda").bfloat16()
        row: dict[str, object] = {"m": m, "n": n, "k": k}
        row["bf16"] = device_microseconds([partial(F.linear, x, w) for x in xs])
        b, b_scale = w.to(torch.float8_e4m3fn), torch.rand(n, 1, device="cuda")
        a_scale = torch.rand(m, 1, device="cuda")
        rows = [(x.to(torch.float8_e4m3fn), a_scale) for x in xs]
        for name, gemm in (("cublas fp8", scaled_gemm), ("triton fp8", fp8_gemm)):
            calls = [partial(gemm, *a, b, b_scale, None, torch.bfloat16) for a in rows]
            row[name] = device_microseconds(calls)
        for key in keys:
            fmt = Format.parse(key)
            weights = [packed_weight(fmt, n, k) for _ in range(4)]
            decodes = [
                partial(decode_e4m3, [Packed(*weight)], fmt, k, torch.bfloat16)
                for weight in weights
            ]
            row[f"decode {key}"] = device_microseconds(decodes)
            tail = (key, None, torch.bfloat16)
            calls = [
                partial(linear, *a, None, key, *weight, *tail)
                for a, weight in product(rows, weights)
            ]
            row[f"linear {key}"] = device_microseconds(calls, 3)
            row[f"linear {key}, host"] = host_microseconds(calls[0])
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        results.append(row)
    return results


def few_rows(keys: list[str], sweep: bool) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    n, k = 18432, 3072
    floats = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(2)]
    bandwidth = copy_bandwidth()
    for key in keys:
        fmt = Format.parse(key)
        weights = [packed_weight(fmt, n, k) for _ in range(7)]
        size = sum(t.numel() * t.element_size() for t in weights[0][:2])
        for m in (1, 2, 4, 8, 16, 32, 64):
            x = torch.randn(m, k, device="cuda").bfloat16()
            calls = [partial(linear_weight_only, x, *weight, key, None) for weight in weights]
            us = device_microseconds(calls)
            row: dict[str, object] = {"format": key, "m": m, "n": n, "k": k, "us": us}
            row["bf16"] = device_microseconds([partial(F.linear, x, w) for w in floats])
            row["share of copy bandwidth"] = round(size / us / bandwidth, 3)
            row["host"] = host_microseconds(calls[0])
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            results.append(row)
        if not sweep or fmt.bits != 4:
            continue
        x = torch.randn(1, k, device="cuda").bfloat16()
        for bn, bk, stages, warps in product((4, 8, 16, 32), (512, 1024), (1, 4), (1, 4)):
            sizes = {"block_n": bn, "block_k": bk, "stages": stages, "warps": warps}
            calls = [partial(gemv, x, *weight, fmt, None, x.dtype, **sizes) for weight in weights]
            us = device_microseconds(calls)
            results.append({"format": key, **sizes, "us": us})
            print(f"gemv {key} block {bn}x{bk} stages {stages} warps {warps}: {us}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", nargs="*", default=["int4:64:bf16"])
    parser.add_argument("--few", action="store_true", help="few rows only")
    parser.add_argument("--sweep", action="store_true", help="block sizes of the one-row kernel")
    args = parser.parse_args()
    result = {
        **made_with(),
        "many_rows": [] if args.few else many_rows(args.keys),
        "few_rows": few_rows(args.keys, args.sweep),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
