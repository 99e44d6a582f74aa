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
from unittest import mock

import torch
from robust_model import calibrated, fingerprint, float_model, inputs
from torch import Tensor, nn

import pq_fx
from pq_fx.errors import DeviceMemoryError, UnsupportedDeviceError
from pq_fx.kernels import reference_ops
from pq_fx.kernels.formats import Format

CHANNELS = 1024
ROWS = 2**31 // CHANNELS + 77  # codes, activations and decoded weights beyond int32
EDGE = 2**31 // CHANNELS
OPS = torch.ops.pq
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


def packed(rows: int, channels: int, key: str) -> tuple[Tensor, Tensor]:
    """A weight of random codes and scales."""
    fmt = Format.parse(key)
    weight = torch.randint(
        256, (rows, fmt.packed_bytes(channels)), device="cuda", dtype=torch.uint8
    )
    scale = torch.rand(rows, fmt.groups(channels), device="cuda") + 0.5
    return weight, scale.to(fmt.scale_dtype)


def same(found: Tensor, wanted: Tensor, allowed: float = 0.0) -> float:
    """Share of bytes that differ, or the relative error of floats; raises above `allowed`."""
    if found.dtype in (torch.uint8, torch.float8_e4m3fn):
        wrong = (found.view(torch.uint8) != wanted.view(torch.uint8)).float().mean().item()
    else:
        wrong = ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
    assert wrong <= allowed, f"{wrong} differs, {allowed} allowed"
    return wrong


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


class Wide(nn.Module):
    """Two linears whose weights are much larger than their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.norm = nn.Linear(64, 1024), nn.LayerNorm(1024)
        self.up, self.down = nn.Linear(1024, 8192), nn.Linear(8192, 1024)
        self.last = nn.Linear(1024, 64)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 64] -> [..., 64]."""
        x = self.inside(x)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.last(nn.functional.layer_norm(x, x.shape[-1:]))


def out_of_memory() -> dict[str, Any]:
    """Limits in the middle of convert: the model as before, the message says how much; without one it converts."""
    torch.manual_seed(0)
    model = Wide().to("cuda", torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(4, 64, 64, device="cuda", dtype=torch.bfloat16)
    quantizer = pq_fx.prepare(model, pq_fx.QuantConfig("int4", calibration_rows=128))
    with torch.no_grad(), quantizer.calibrate(progress=False):
        model(x)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    want = model(x)
    messages, total = [], torch.cuda.get_device_properties(0).total_memory
    for spare in (1 << 20, 16 << 20, 40 << 20, 70 << 20, 100 << 20):
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + spare
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            quantizer.convert()
            messages.append(f"{spare >> 20} MiB spare: converted")
            break
        except DeviceMemoryError as error:
            messages.append(f"{spare >> 20} MiB spare: {error}")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        assert torch.equal(model(x), want)
    else:
        quantizer.convert()
    assert len(messages) > 1, messages
    error = ((model(x) - want).norm() / want.norm()).item()
    assert error < 0.3, error
    return {"messages": messages, "error after": error}


def determinism() -> dict[str, Any]:
    """Two runs on the GPU give equal bytes; a kernel gives equal bytes twenty times; another seed other rows only."""
    prints = []
    for seed in (0, 0, 1):
        model = float_model().to("cuda")
        config = pq_fx.QuantConfig(
            "int4", group_size=16, method="best", calibration_rows=16, seed=seed
        )
        quantizer = calibrated(model, config)
        moments = {
            n: (m.sum_squares.cpu(), m.amax.cpu())
            for n, m in quantizer.statistics().moments.items()
        }
        quantizer.convert()
        prints.append((fingerprint(model.cpu())["state"], moments))
    assert prints[0][0] == prints[1][0]
    for name, (sums, amax) in prints[0][1].items():
        assert torch.equal(sums, prints[2][1][name][0]) and torch.equal(amax, prints[2][1][name][1])
    x = torch.randn(517, CHANNELS, device="cuda", dtype=torch.bfloat16)
    weight, scale = packed(304, CHANNELS, "int4:64:bf16")
    runs = []
    for _ in range(20):
        data, s = OPS.norm_quantize(
            x, "layer", None, None, 1e-6, None, None, None, None, None, "int4:64:bf16", 64, "e4m3"
        )
        runs.append(
            (
                data,
                s,
                OPS.linear(
                    data,
                    s,
                    None,
                    "int4:64:bf16",
                    weight,
                    scale,
                    None,
                    "int4:64:bf16",
                    None,
                    x.dtype,
                ),
            )
        )
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for run in runs[1:]
        for a, b in zip(run, runs[0], strict=True)
    )
    return {"models": 3, "kernel runs": 20}


def without_fp8() -> dict[str, Any]:
    """A driver that reports an older chip: code points and 16-bit tensor cores, or a named error."""
    model = float_model().to("cuda", torch.bfloat16)
    calls = {
        n: v.to("cuda", torch.bfloat16 if v.is_floating_point() else None)
        for n, v in inputs(7).items()
    }
    calibration = pq_fx.prepare(model, pq_fx.QuantConfig("int4", group_size=16))
    with torch.no_grad(), calibration.calibrate(progress=False):
        model(**calls)
    calibration.convert()
    with torch.no_grad():
        fp8 = model(**calls)[0]
        with mock.patch("torch.cuda.get_device_capability", lambda *_: (8, 0)):
            codes = model(**calls)[0]
        with mock.patch("torch.cuda.get_device_capability", lambda *_: (7, 5)):
            try:
                model(**calls)
                raise AssertionError("sm_75 ran")
            except UnsupportedDeviceError as error:
                named = str(error)
    on_cpu = model.cpu()(**{n: v.cpu() for n, v in calls.items()})[0]
    return {
        "sm_75": named,
        "sm_80 against cpu": same(codes.cpu(), on_cpu, 0.1),
        "fp8 against cpu": same(fp8.cpu(), on_cpu, 0.2),
    }


CHECKS: tuple[Check, ...] = (
    without_fp8,
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
