"""On one CUDA device: tensors beyond 2^31 elements, memory that runs out in convert, determinism, chips without fp8.

    python bench/robust_gpu.py --out $OUT/robust_gpu.json

Each check is written as it is done; the first wrong number is counted and named, and the next check runs.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from robust_gpu_model import (
    CHANNELS,
    OPS,
    determinism,
    out_of_memory,
    packed,
    same,
    without_fp8,
)
from torch import Tensor

import pq_fx
from pq_fx.kernels import reference_ops

ROWS = 2**31 // CHANNELS + 77  # codes, activations and decoded weights beyond int32
EDGE = 2**31 // CHANNELS
Check = Callable[[], dict[str, Any]]


def rows_near_the_edges() -> Tensor:
    """Where an int32 index of elements or bytes would wrap: at 2^31 elements, 2^31 bytes of 16 bits, and the ends."""
    near = [
        0,
        ROWS - 1,
        *range(EDGE - 3, EDGE + 5),
        *range(EDGE // 2 - 2, EDGE // 2 + 3),
        EDGE // 4,
    ]
    return torch.tensor(sorted(set(near)), device="cuda")


def not_finite() -> dict[str, Any]:
    """NaN and infinities in: their rows come out NaN or infinite, other rows as in the reference."""
    keys = (
        "int4:64:bf16",
        "int4:16:pow2",
        "int3:64:bf16",
        "int4f:64:bf16",
        "int3f:64:bf16",
        "nvfp4:16:e4m3",
        "mxfp4:32:e8m0",
        "fp8:0:fp32",
    )
    done = {}
    for key in keys:
        weight, scale = packed(48, 256, key)
        if key[0] in "nm":
            scale = (torch.full_like(scale.float(), 8.0) if key[0] == "n" else scale * 0 + 127).to(
                scale.dtype
            )
        whole = torch.tensor(0.01, device="cuda") if key[0] == "n" else None
        x = torch.randn(8, 256, device="cuda", dtype=torch.float16)
        for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            x[row, 100 + row] = bad
        x[3] = 0
        x[4, 7] = 65504
        for carrier in ("codes", "e4m3"):
            for name, first in (
                ("quantize", ()),
                ("act_quantize", (None, "silu", None)),
                ("norm_quantize", ("rms", None, None, 1e-6, None, None)),
            ):
                args = (*first, None, whole, None, key, 0, carrier)
                data, s = getattr(OPS, name)(x, *args)
                rest = whole, key, weight, scale, whole, key, None, torch.bfloat16
                y = OPS.linear(data, s, *rest).float().cpu()
                on_cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
                wanted = getattr(reference_ops, name)(x.cpu(), *on_cpu)
                rest = [a.cpu() if isinstance(a, Tensor) else a for a in rest]
                wanted = reference_ops.linear(*wanted, *rest).float()
                bad = [0, 1] if name == "act_quantize" else [0, 1, 2]  # silu(-inf) is NaN or -0
                assert not y[bad].isfinite().any(), (key, name, carrier)
                assert y[3:].isfinite().all(), (key, name, carrier)
                done[f"{name} {key} {carrier}"] = same(y[3:], wanted[3:], 0.05)
    return done


def large_quantize() -> dict[str, Any]:
    """quantize, norm_quantize and act_quantize of 2^31 elements and some, both carriers, with a gather."""
    at, done = rows_near_the_edges(), {}
    x = torch.randn(ROWS, CHANNELS, device="cuda", dtype=torch.bfloat16)
    perm = torch.randperm(CHANNELS, device="cuda").int()
    key, few = "int4:64:bf16", x[at].cpu()
    for carrier in ("codes", "e4m3"):
        tail = (None, None, key, 64, carrier)
        for name, first in (
            ("quantize", ()),
            ("norm_quantize", ("rms", None, None, 1e-6, None, None)),
            ("act_quantize", (None, "silu", None)),
        ):
            data, scale = getattr(OPS, name)(x, *first, perm, *tail)
            wanted, wanted_scale = getattr(reference_ops, name)(few, *first, perm.cpu(), *tail)
            exact = (
                0.002  # a rotation on tensor cores and a norm sum in another order (thresholds.py)
            )
            done[f"{name} {carrier}"] = same(data[at].cpu(), wanted, exact)
            same(scale[at].cpu().float(), wanted_scale.float(), 0.01)
            del data, scale
    return done


def large_linear() -> dict[str, Any]:
    """Activations, outputs and decoded weights beyond 2^31 elements, in cuBLAS and in both Triton kernels."""
    at, done = rows_near_the_edges(), {}
    key = "int4:64:bf16"
    x = torch.randn(ROWS, CHANNELS, device="cuda", dtype=torch.bfloat16)
    few = x[at].cpu()
    weight, scale = packed(48, CHANNELS, key)
    for carrier, dtype in (
        ("e4m3", torch.bfloat16),
        ("e4m3", torch.float16),
        ("codes", torch.bfloat16),
    ):
        data, data_scale = OPS.quantize(x, None, None, None, key, 0, carrier)
        args = (None, key, weight, scale, None, key, None, dtype)
        y = OPS.linear(data, data_scale, *args)
        q = reference_ops.quantize(few, None, None, None, key, 0, carrier)
        on_cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
        done[f"rows {carrier} {dtype}"] = same(
            y[at].cpu(), reference_ops.linear(*q, *on_cpu), 0.005
        )
        del data, data_scale, y
    del x
    columns = 16_400
    count = 2**31 // columns + 9
    x = torch.randn(count, 64, device="cuda", dtype=torch.bfloat16)
    weight, scale = packed(columns, 64, key)
    near = torch.tensor([0, *range(count - 18, count)], device="cuda")
    for carrier, dtype in (
        ("e4m3", torch.bfloat16),
        ("e4m3", torch.float16),
        ("codes", torch.bfloat16),
    ):
        args = (None, key, weight, scale, None, key, None, dtype)
        y = OPS.linear(*OPS.quantize(x, None, None, None, key, 0, carrier), *args)
        q = reference_ops.quantize(x[near].cpu(), None, None, None, key, 0, carrier)
        on_cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
        done[f"outputs {carrier} {dtype}"] = same(
            y[near].cpu(), reference_ops.linear(*q, *on_cpu), 0.005
        )
        del y
    weight, scale = packed(ROWS, CHANNELS, "int4:128:bf16")
    fmt = "int4:128:bf16"
    for count in (1, 16, 65):  # gemv, the dequantizing GEMM, decode and cuBLAS
        x = torch.randn(count, CHANNELS, device="cuda", dtype=torch.bfloat16)
        y = OPS.linear_weight_only(x, weight, scale, None, fmt, None)
        wanted = reference_ops.linear_weight_only(
            x.cpu(), weight[at].cpu(), scale[at].cpu(), None, fmt, None
        )
        done[f"weight rows, {count} rows of x"] = same(y[:, at].cpu(), wanted, 0.01)
        del y
    return done


def many_in_a_batch() -> dict[str, Any]:
    """More batch entries than a CUDA grid's second axis holds (65535)."""
    x = torch.randn(70_001, 2, 64, device="cuda", dtype=torch.bfloat16)
    args = (None, None, None, "int4:64:bf16", 0, "codes")
    data, _ = OPS.quantize(x, *args)
    wrong = same(data[-9:].cpu(), reference_ops.quantize(x[-9:].cpu(), *args)[0])
    shift = torch.randn(70_001, 64, device="cuda", dtype=torch.bfloat16)
    try:
        OPS.norm_quantize(x, "layer", None, None, 1e-6, None, shift, *args)
        named = "runs"
    except pq_fx.errors.PQError as error:
        named = f"{type(error).__name__}: {error}"
    return {"quantize": wrong, "modulated": named}


CHECKS: tuple[Check, ...] = (
    without_fp8,
    not_finite,
    determinism,
    out_of_memory,
    many_in_a_batch,
    large_quantize,
    large_linear,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import triton

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": {},
    }
    for check in CHECKS:
        start = time.perf_counter()
        try:
            found = {"wrong": 0, **check()}
        except Exception as error:
            traceback.print_exc()
            found = {"wrong": 1, "error": f"{type(error).__name__}: {error}"[:600]}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        result["checks"][check.__name__] = found | {
            "seconds": round(time.perf_counter() - start, 1)
        }
        print(check.__name__, json.dumps(result["checks"][check.__name__]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    result["wrong"] = sum(c["wrong"] for c in result["checks"].values())
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
