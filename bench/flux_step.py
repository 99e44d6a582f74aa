"""One denoising step of the full FLUX.1-dev transformer, side by side: 16 bits against pq_fx.

    python bench/flux_step.py --out bench/results/flux_step_h100.json

Real configuration (19 + 38 blocks, 11.9 B parameters), random weights with planted outlier channels, 1024 x 1024 pixels
(4096 image tokens), 512 text tokens, batch 1. Every variant is compiled per block (`compile_repeated_blocks`), runs the
same inputs in the same process, and is timed by CUDA events: median of the steps after warm-up. `--layers` shrinks the
model for a trial. Stops at the first result that is not finite.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from diffusers import FluxTransformer2DModel

import pq_fx

GIB = 2**30


def build(layers: tuple[int, int], seed: int = 0) -> FluxTransformer2DModel:
    """FLUX.1-dev's architecture in bf16 on the GPU, with channels of very different size as trained models have."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=layers[0],
            num_single_layers=layers[1],
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval().requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        p.normal_(0.0, 0.7 / p.shape[1] ** 0.5, generator=generator)
        outliers = torch.randint(
            p.shape[1], (max(1, p.shape[1] // 100),), device="cuda", generator=generator
        )
        p[:, outliers] *= 4.0
    return model


def inputs(side: int, batch: int, text: int = 512) -> dict[str, Any]:
    """One step's inputs at side x side pixels."""
    n = side // 16
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.zeros(n, n, 3, device="cuda")
    ids[..., 1] = torch.arange(n, device="cuda")[:, None]
    ids[..., 2] = torch.arange(n, device="cuda")[None, :]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    return {
        "hidden_states": randn(batch, n * n, 64),
        "encoder_hidden_states": randn(batch, text, 4096),
        "pooled_projections": randn(batch, 768),
        "timestep": torch.full((batch,), 0.6, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.full((batch,), 3.5, device="cuda", dtype=torch.bfloat16),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3, device="cuda"),
        "return_dict": False,
    }


@torch.no_grad()
def measure(label: str, model: torch.nn.Module, x: dict[str, Any], steps: int) -> dict[str, Any]:
    """First call, then the median step, memory and a result to compare."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    out = model(**x)[0]
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    if not torch.isfinite(out).all():
        sys.exit(f"{label}: output is not finite")
    for _ in range(3):
        model(**x)
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        model(**x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    weights = sum(
        t.numel() * t.element_size()
        for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    )
    row = {
        "label": label,
        "ms": round(statistics.median(times), 2),
        "ms_min": round(min(times), 2),
        "first_call_s": round(first, 1),
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
    }
    print(json.dumps(row), flush=True)
    return row


@torch.no_grad()
def graphed(label: str, model: torch.nn.Module, x: dict[str, Any], steps: int) -> dict[str, Any]:
    """The same compiled model replayed as one CUDA graph: what is left when launches cost nothing."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(**x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        model(**x)
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    row = {
        "label": f"{label}, one CUDA graph",
        "ms": round(statistics.median(times), 2),
        "ms_min": round(min(times), 2),
    }
    print(json.dumps(row), flush=True)
    del graph
    return row


def kernels(model: torch.nn.Module, x: dict[str, Any]) -> dict[str, float]:
    """Milliseconds a step by kernel name, from the profiler; the 25 largest."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as seen:
        model(**x)
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in seen.key_averages():
        total[event.key[:90]] = round(event.self_device_time_total / 1000.0, 3)
    return dict(sorted(total.items(), key=lambda item: -item[1])[:25])


def attempt(function: Callable[[], dict[str, Any]], label: str) -> dict[str, Any]:
    """A variant that fails is a row that says so; the others still run."""
    try:
        return function()
    except (RuntimeError, pq_fx.errors.PQError) as error:
        print(f"{label}: {error}", flush=True)
        return {"label": label, "error": str(error)[:400]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38))
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--method", default="permuquant-h")
    args = parser.parse_args()
    x = inputs(args.side, 1)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "layers": args.layers,
        "side": args.side,
        "rows": [],
    }
    rows = result["rows"]

    def save() -> None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")

    model = build(tuple(args.layers))
    rows.append(measure("bf16, eager", model, x, args.steps // 2))
    model.compile_repeated_blocks(fullgraph=True)
    rows.append(measure("bf16, compile_repeated_blocks", model, x, args.steps))
    rows.append(
        attempt(
            lambda: graphed("bf16, compile_repeated_blocks", model, x, args.steps), "bf16 graph"
        )
    )
    save()
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block._compiled_call_impl = None
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()

    label = f"pq_fx {args.format}, {args.method}"
    start = time.perf_counter()
    config = pq_fx.QuantConfig(args.format, method=args.method, alphas=(0.5,))
    quantizer = pq_fx.prepare(model, config)
    with torch.no_grad(), quantizer.calibrate():
        for t in (0.9, 0.3):
            model(**(x | {"timestep": torch.full_like(x["timestep"], t)}))
    result["calibrate_s"] = round(time.perf_counter() - start, 1)
    print("calibrated", result["calibrate_s"], flush=True)
    torch.cuda.reset_peak_memory_stats()
    report = quantizer.convert()
    result["convert_s"] = round(report.seconds, 1)
    result["convert_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    result["summary"] = report.summary
    print(report.summary, flush=True)
    del quantizer
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model.compile_repeated_blocks(fullgraph=True, backend="permuquant")
    rows.append(measure(label, model, x, args.steps))
    save()
    result["kernels_ms"] = kernels(model, x)
    save()
    rows.append(attempt(lambda: graphed(label, model, x, args.steps), label))
    base = next(r["ms"] for r in rows if r["label"] == "bf16, compile_repeated_blocks")
    for row in rows:
        if "ms" in row:
            row["ratio_to_compiled_bf16"] = round(row["ms"] / base, 3)
    save()


if __name__ == "__main__":
    main()
