"""Where a step's time goes: kernels by class from the profiler, and the floor from FLOPs and bytes."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

# First match wins. Inductor names its own kernels after the operations inside.
CLASSES = (
    ("attention", r"sdpa_sm|flash|fmha|attention_kernel|cudnn_generated"),
    ("one row", r"^_gemv|gemv"),
    ("decode", r"^_\w*decode"),
    ("quantize", r"^_\w*quantize"),
    ("gemm", r"nvjet|gemm|cutlass|splitK|cublas|_scaled_mm"),
    ("qk norm + rope", r"triton_\w*(rms_norm|attention|neg|stack|rsqrt)"),
    ("norm, gate, cat", r"triton_|elementwise|layer_norm|CatArray|reduce|copy|Mem"),
)
# What an H100 reached elsewhere (bench/bench_gemm.py, cuDNN attention), TFLOP/s and TB/s.
CEILINGS = {"fp8": 1400.0, "bf16": 720.0, "attention": 612.0, "memory": 3.0}


def by_class(kernels: dict[str, tuple[float, int]]) -> dict[str, dict[str, float]]:
    """{kernel: (ms, launches)} summed by class: {class: {"ms", "launches"}}."""
    table: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, (ms, count) in kernels.items():
        label = next((c for c, pattern in CLASSES if re.search(pattern, name)), "rest")
        table[label][0] += ms
        table[label][1] += count
    order = [c for c, _ in CLASSES] + ["rest"]
    return {
        c: {"ms": round(table[c][0], 3), "launches": int(table[c][1])} for c in order if c in table
    }


@torch.no_grad()
def kernel_times(model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """One step under the profiler: {kernel name: (ms, launches)}, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        model(**inputs)
        torch.cuda.synchronize()
    found = {
        e.key[:120]: (round(e.self_device_time_total / 1000.0, 3), e.count)
        for e in seen.key_averages()
        if e.self_device_time_total > 0
    }
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


@torch.no_grad()
def work(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """TFLOP of the many-row linears and of attention in one step, and weights of each kind; runs on meta tensors."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = {"gemm_tflop": 0.0, "one_row_weights": 0.0, "many_row_weights": 0.0}
    linear_flops = 0

    def count(module: nn.Linear, args: tuple[torch.Tensor, ...], _: Any) -> None:
        nonlocal linear_flops
        rows = args[0].numel() // args[0].shape[-1]
        linear_flops += 2 * rows * module.weight.numel()
        many = rows > 64
        counted["many_row_weights" if many else "one_row_weights"] += module.weight.numel()
        if many:
            counted["gemm_tflop"] += 2e-12 * rows * module.weight.numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    with FlopCounterMode(display=False) as flops:
        model(**inputs)
    for handle in handles:
        handle.remove()
    others = flops.get_total_flops() - linear_flops
    return counted | {"attention_tflop": others * 1e-12}


def floor_ms(done: dict[str, float]) -> dict[str, float]:
    """The least a W4A4 step can take on the fp8 path: GEMMs and attention at their ceilings, weights at memory speed.

    A many-row weight is read packed, written and (by the GEMM, counted there) read as fp8; a one-row weight is read.
    """
    memory = CEILINGS["memory"] * 1e9  # bytes a millisecond
    parts = {
        "gemm": done["gemm_tflop"] / CEILINGS["fp8"] * 1e3,
        "attention": done["attention_tflop"] / CEILINGS["attention"] * 1e3,
        "decode": done["many_row_weights"] * (0.53 + 1.0) / memory,
        "one row": done["one_row_weights"] * 0.53 / memory,
    }
    parts["sum"] = sum(parts.values())
    return {k: round(v, 2) for k, v in parts.items()}
