"""Checks of bench/robust_gpu.py that convert and run whole models."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from robust_model import calibrated, fingerprint, float_model, inputs
from torch import Tensor, nn

import pq_fx
from pq_fx.errors import DeviceMemoryError, UnsupportedDeviceError
from pq_fx.kernels.formats import Format

CHANNELS = 1024
OPS = torch.ops.pq


def packed(rows: int, channels: int, key: str) -> tuple[Tensor, Tensor]:
    """A weight of random codes and scales."""
    fmt = Format.parse(key)
    top = 127 if fmt.name == "fp8" else 256  # e4m3's 127 and 255 are NaN
    size = rows, fmt.packed_bytes(channels)
    weight = torch.randint(top, size, device="cuda", dtype=torch.uint8)
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
