"""gemlite's int4 linears beside pq_fx's, the same weights: few rows (weights only) and many.

    pip install gemlite
    python bench/bench_gemlite.py --out bench/results/gemlite_h100.json

Device time a call in microseconds (`timing.device_microseconds`). gemlite searches its tiles on the
first call (its setting "fast"); that is not timed. Its outputs are compared with the dequantized
weights first, so that both compute the same product: W = (code - 8) * scale, groups of 64.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_gemm import packed_weight
from gemlite.helper import A16W4_HQQ_INT, A8W4_HQQ_INT_dynamic
from timing import device_microseconds, made_with

from pq_fx.kernels.activation_quantize import quantize
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemv import linear_weight_only
from pq_fx.kernels.linear import linear
from pq_fx.kernels.pack import unpack
from pq_fx.kernels.values import apply_scale, element_values, scale_values

KEY = "int4:64:bf16"
FEW = ((1, 18432, 3072), (8, 18432, 3072), (64, 18432, 3072))
MANY = ((4096, 3072, 3072), (4096, 9216, 3072))


def gemlite_linear(kind: Any, elements: torch.Tensor, scale: torch.Tensor) -> Any:
    """gemlite's linear of integers [N, K] in -7..7 with scales [N, K / 64]."""
    codes = (elements + 8).to(torch.uint8)
    scales = scale.reshape(-1, 1).to(torch.bfloat16)
    return kind(dtype=torch.bfloat16).from_weights(codes, scales, torch.full_like(scales, 8))


def one(m: int, n: int, k: int, warm: bool) -> dict[str, Any]:
    """Times of one shape: bf16 cuBLAS, pq_fx, gemlite with 16-bit activations and (many rows) fp8."""
    fmt = Format.parse(KEY)
    sets = 1 if warm else 7 if m <= 64 else 4
    weights = [packed_weight(fmt, n, k) for _ in range(sets)]
    xs = [torch.randn(m, k, device="cuda").bfloat16() for _ in range(1 if m <= 64 else 2)]
    row: dict[str, Any] = {"m": m, "n": n, "k": k}
    calls: dict[str, list[Any]] = {}
    kinds = {"gemlite A16W4": A16W4_HQQ_INT}
    if m > 64:
        kinds["gemlite A8W4 fp8"] = A8W4_HQQ_INT_dynamic
    for name, kind in kinds.items():
        linears = []
        for weight, scale, _ in weights:
            elements = element_values(unpack(weight, fmt, k), fmt)
            linears.append(gemlite_linear(kind, elements, scale))
        begin = time.perf_counter()
        out = linears[0](xs[0]).float()
        torch.cuda.synchronize()
        row[f"{name}, search s"] = round(time.perf_counter() - begin, 1)
        weight, scale, _ = weights[0]
        elements = element_values(unpack(weight, fmt, k), fmt)
        exact = xs[0].float() @ apply_scale(elements, scale_values(scale, fmt)).t()
        error = float(((out - exact).norm() / exact.norm()).item())
        row[f"{name}, relative error"] = round(error, 5)
        if not error < 0.06:
            raise SystemExit(f"{name} at {m}x{n}x{k} computes something else: error {error}")
        calls[name] = [partial(f, x) for x, f in product(xs, linears)]
    if m <= 64:
        calls["pq_fx weights only"] = [
            partial(linear_weight_only, x, *w, KEY, None) for x, w in product(xs, weights)
        ]
    else:
        rows = [quantize(x, None, None, None, KEY, 0, "e4m3") for x in xs]
        tail = (KEY, None, torch.bfloat16)
        calls["pq_fx W4A4, decode included"] = [
            partial(linear, *a, None, KEY, *w, *tail) for a, w in product(rows, weights)
        ]
    floats = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(2)]
    calls["bf16 cuBLAS"] = [partial(F.linear, x, w) for x, w in product(xs, floats)]
    for name, some in calls.items():
        some[0]()
        if not warm:
            row[name] = device_microseconds(some, 3)
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", action="store_true", help="compile only, time nothing")
    args = parser.parse_args()
    result: dict[str, Any] = {
        **made_with(),
        "gemlite": version("gemlite"),
        "rows": [],
    }
    for shape in FEW + MANY:
        torch.manual_seed(0)
        result["rows"].append(one(*shape, args.warm))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
