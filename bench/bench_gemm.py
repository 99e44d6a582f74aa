"""Time of the packed-weight linears against cuBLAS in bf16 and fp8, at FLUX.1-dev's shapes.

    python bench/bench_gemm.py --out bench/results/gemm_h100.json

Medians of triton's `do_bench`, microseconds. "linear" includes the decode of the packed weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from triton.testing import do_bench

from pq_fx.kernels.decode import decode_e4m3
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_fp8 import fp8_gemm, linear, scaled_gemm
from pq_fx.kernels.gemv import gemv, linear_weight_only
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


def microseconds(call: Callable[[], object]) -> float:
    return round(1000.0 * float(do_bench(call, warmup=10, rep=60, return_mode="median")), 2)


Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def packed_weight(fmt: Format, n: int, k: int) -> Weight:
    w = torch.randn(n, k, device="cuda")
    glob = nvfp4_global_scale(w.abs().amax()) if fmt.two_level else None
    q = quantize(w, fmt, global_scale=glob)
    return pack(q.codes, fmt), q.scale, glob


def many_rows(keys: list[str]) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for m, n, k in SHAPES:
        x = torch.randn(m, k, device="cuda").bfloat16()
        w = torch.randn(n, k, device="cuda").bfloat16()
        row: dict[str, object] = {"m": m, "n": n, "k": k}
        row["bf16"] = microseconds(lambda x=x, w=w: F.linear(x, w))
        a = x.to(torch.float8_e4m3fn)
        a_scale = torch.rand(m, 1, device="cuda")
        b, b_scale = w.to(torch.float8_e4m3fn), torch.rand(n, 1, device="cuda")
        operands = (a, a_scale, b, b_scale, None, torch.bfloat16)
        row["cublas fp8"] = microseconds(lambda o=operands: scaled_gemm(*o))
        row["triton fp8"] = microseconds(lambda o=operands: fp8_gemm(*o))
        for key in keys:
            fmt = Format.parse(key)
            weight = packed_weight(fmt, n, k)
            row[f"decode {key}"] = microseconds(
                lambda weight=weight, fmt=fmt, k=k: decode_e4m3(*weight, fmt, k)
            )
            args = (a, a_scale, None, key, *weight, key, None, torch.bfloat16)
            row[f"linear {key}"] = microseconds(lambda args=args: linear(*args))
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        results.append(row)
    return results


def few_rows(keys: list[str], sweep: bool) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    n, k = 18432, 3072
    w = torch.randn(n, k, device="cuda").bfloat16()
    for key in keys:
        fmt = Format.parse(key)
        weight = packed_weight(fmt, n, k)
        size = sum(t.numel() * t.element_size() for t in weight[:2])
        for m in (1, 4, 16, 64):
            x = torch.randn(m, k, device="cuda").bfloat16()
            row: dict[str, object] = {"format": key, "m": m, "n": n, "k": k}
            row["bf16"] = microseconds(lambda x=x: F.linear(x, w))
            row["linear_weight_only"] = microseconds(
                lambda x=x, weight=weight, key=key: linear_weight_only(x, *weight, key, None)
            )
            row["weight bytes per us"] = round(size / float(str(row["linear_weight_only"])))
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            results.append(row)
        if sweep and fmt.bits == 4:
            x = torch.randn(1, k, device="cuda").bfloat16()
            for bn, bk, stages, warps in product((8, 16, 32), (512, 1024), (1, 4), (4,)):
                us = microseconds(
                    lambda x=x, weight=weight, fmt=fmt, bn=bn, bk=bk, stages=stages, warps=warps: (
                        gemv(
                            x, *weight, fmt, None, block_n=bn, block_k=bk, stages=stages,
                            warps=warps,
                        )
                    )
                )  # fmt: skip
                results.append({"format": key, "sweep": [bn, bk, stages, warps], "us": us})
                print(f"gemv {key} block {bn}x{bk} stages {stages} warps {warps}: {us}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", nargs="*", default=["int4:64:bf16"])
    parser.add_argument("--sweep", action="store_true", help="block sizes of the one-row kernel")
    args = parser.parse_args()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "many_rows": many_rows(args.keys),
        "few_rows": few_rows(args.keys, args.sweep),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
