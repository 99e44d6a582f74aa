"""One denoising step of a full diffusion transformer, side by side: 16 bits, torchao fp8, pq_fx.

    python bench/flux_step.py --out bench/results/flux_step_h100.json
    python bench/flux_step.py --sizes 512 2048 1024x4 --variants bf16 bf16+graphs@512 w4a4-int4 --out sizes.json

FLUX.1-dev by default (19 + 38 blocks, 11.9 B parameters, 1024 x 1024 pixels, 512 text tokens, batch 1); random weights
with planted outlier channels. A size is pixels[xBATCH]. A variant is NAME[+whole][+graphs][@SIZE]:

    eager            bf16 as it is                       bf16            compiled block by block
    torchao-fp8      dynamic activations, row scales     PRESET, FORMAT  pq_fx, e.g. w4a4-int4, w4a8-int4; int4f

+whole compiles the model as one graph, +graphs compiles with mode="reduce-overhead"; @SIZE takes that size instead of
`--sizes`. All variants see the same inputs in the same process; neighbours of the same NAME share the model. CUDA
events, median of `--steps` after warm-up (5 or more in 3 seconds where a step is long). Rows are written as they come;
the first output that is not finite stops the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from step_models import MODELS, build, repeated_blocks, step_inputs
from step_profile import by_class, floor_ms, kernel_times, work
from timing import made_with
from torch import nn

import pq_fx
from pq_fx.presets import changes_of_name

GIB = 2**30
DEFAULT = (
    "eager bf16 bf16+graphs w4a4-int4 w4a4-int4+graphs w4a8-int4 w4a4-nvfp4 w4a4-mxfp4 torchao-fp8"
)


class Bench:
    """Holds one model at a time and the calibration that all pq_fx variants share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.inputs: dict[str, Any] = {}
        self.model: nn.Module | None = None
        self.name = ""
        self.calibration: Any = None
        self.notes: dict[str, Any] = {}

    def float_model(self) -> nn.Module:
        """A new float model; the last one is dropped first."""
        self.model = None
        self.reset()
        args = self.args
        return build(args.model, args.layers, args.tiny, args.device)

    def reset(self) -> None:
        """Forget compiled code and free its memory."""
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def get(self, name: str) -> nn.Module:
        """The model of a variant, quantized where it says so."""
        if self.model is None or name != self.name:
            self.model, self.name = self.float_model(), name
            if name == "torchao-fp8":
                self.model = torchao_fp8(self.model)
            elif name not in ("eager", "bf16"):
                self.quantize(name)
        return self.model

    @torch.no_grad()
    def quantize(self, preset: str) -> None:
        """Convert with cheap settings: the search changes accuracy, not speed. One calibration serves all formats."""
        settings = {"method": self.args.method, "alphas": (0.5,)}
        config = pq_fx.QuantConfig.from_dict(changes_of_name(preset) | settings)
        if self.calibration is None:
            start = time.perf_counter()
            quantizer = pq_fx.prepare(self.model, config)
            few = step_inputs(self.args.model, 256, 1, self.args.device)
            with quantizer.calibrate():
                self.model(**few)
            self.calibration = quantizer.statistics()
            self.notes["calibrate_s"] = round(time.perf_counter() - start, 1)
            print("calibrated", self.notes["calibrate_s"], flush=True)
            self.reset()
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        report = pq_fx.prepare(self.model, config, statistics=self.calibration).convert()
        self.notes[preset] = {
            "convert_s": round(report.seconds, 1),
            "convert_peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "summary": report.summary,
        }
        print(report.summary, flush=True)

    def run(self, variant: str, size: tuple[int, int]) -> dict[str, Any]:
        """One row of the table: a variant at (pixels, batch)."""
        name, *how = variant.split("+")
        model = self.get(name)
        self.inputs = step_inputs(self.args.model, *size, self.args.device)
        self.reset()
        for module in model.modules():
            module._compiled_call_impl = None
        if name != "eager":
            options: dict[str, Any] = {"fullgraph": True}
            if name not in ("bf16", "torchao-fp8"):
                options["backend"] = pq_fx.permuquant
            if "graphs" in how:
                options["mode"] = "reduce-overhead"
            for module in [model] if "whole" in how else repeated_blocks(model):
                module.compile(**options)
        row = measure(variant, model, self.inputs, self.args)
        if self.args.device == "cuda" and not how:
            kernels = kernel_times(model, self.inputs)
            row["classes_ms"] = by_class(kernels)
            row["gpu_busy_ms"] = round(sum(ms for ms, _ in kernels.values()), 2)
            row["kernels"] = dict(list(kernels.items())[:30])
            if name != "eager":
                row["one_cuda_graph_ms"] = graphed(model, self.inputs, row["steps"])
        return row


def torchao_fp8(model: nn.Module) -> nn.Module:
    """torchao's dynamic fp8 with row scales on the linears of the blocks.

    Without the two settings, Inductor benchmarks templates against cuBLAS for every shape, and torchao has it search
    tiles of every kernel (coordinate descent), in this process and for all later models too; that takes minutes and was
    not finished in earlier runs. cuBLAS is the fastest at these shapes, and the other variants search no tiles either.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    torch._inductor.config.max_autotune_gemm_backends = "ATEN"
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    for block in repeated_blocks(model):
        quantize_(block, config)
    return model


def timed(call: Any, steps: int, device: str) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(steps):
        if device != "cuda":
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


@torch.no_grad()
def measure(
    label: str, model: nn.Module, inputs: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """First call, median step, memory, and a check that the result is finite."""

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return model(**inputs)[0]

    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    weights = sum(size_of(t) for t in tensors.values())
    others = torch.cuda.memory_allocated() - weights  # the calibration that the variants share
    start = time.perf_counter()
    out = step()
    if not all(torch.isfinite(t).all() for t in (out if isinstance(out, list) else [out])):
        sys.exit(f"{label}: output is not finite")
    first = time.perf_counter() - start
    del out
    once = min(timed(step, 3, args.device))  # with CUDA graphs the second call records
    warm = time.perf_counter() - start
    times = timed(step, min(args.steps, max(5, int(3000 / once))), args.device)
    return {
        "ms": round(statistics.median(times), 2),
        "ms_min": round(min(times), 2),
        "steps": len(times),
        "first_call_s": round(first, 1),
        "first_4_calls_s": round(warm, 1),
        "weights_gib": round(weights / GIB, 2),
        "peak_gib": round((torch.cuda.max_memory_allocated() - others) / GIB, 2),
    }


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of what a torchao tensor holds."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(size_of(getattr(tensor, n)) for n in names)
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def graphed(model: nn.Module, inputs: dict[str, Any], steps: int) -> float | str:
    """The compiled step replayed as one CUDA graph: what is left when launches cost nothing."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            model(**inputs)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            model(**inputs)
    except RuntimeError as error:
        return f"not captured: {str(error)[:200]}"
    return round(statistics.median(timed(graph.replay, steps, "cuda")), 2)


class TooLong(BaseException):
    """A variant passed its time limit. No Exception: Inductor catches those around each kernel it compiles."""


def _stop(*_: Any) -> None:
    raise TooLong


def size_of_step(text: str) -> tuple[int, int]:
    """ "1024" or "1024x4" as (pixels of a side, batch)."""
    side, _, batch = text.partition("x")
    return int(side), int(batch or 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=DEFAULT.split())
    parser.add_argument("--model", choices=list(MODELS), default="flux.1-dev")
    parser.add_argument("--layers", type=int, nargs="+", help="fewer blocks, for a trial")
    parser.add_argument("--sizes", nargs="+", type=size_of_step, default=[(1024, 1)])
    parser.add_argument("--beside", default="nothing", help="what else the machine did, noted")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", default="permuquant-h")
    parser.add_argument("--limit", type=int, default=150, help="seconds of a row, conversion apart")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the script")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    bench = Bench(args)
    result: dict[str, Any] = {
        **made_with(args.device),
        **{k: getattr(args, k) for k in ("model", "layers", "sizes", "method", "beside")},
        "rows": [],
        "notes": bench.notes,
    }
    parts = [variant.partition("@") for variant in args.variants]
    rows = [(v, s) for v, _, own in parts for s in ([size_of_step(own)] if own else args.sizes)]
    meta = build(args.model, args.layers, args.tiny, "meta")
    for side, batch in dict.fromkeys(size for _, size in rows):
        done = work(meta, step_inputs(args.model, side, batch, "meta"))
        result.setdefault("floor", []).append(
            {"side": side, "batch": batch, "work": done, "ms": floor_ms(done)}
        )
    print(json.dumps(result["floor"]), flush=True)
    signal.signal(signal.SIGALRM, _stop)
    for variant, size in rows:
        result["rows"].append(row := guarded(bench, variant, size))
        same = (r for r in result["rows"] if r["label"] == "bf16" and r["size"] == row["size"])
        base = next((r.get("ms") for r in same), None)
        if base and "ms" in row:
            row["ratio_to_compiled_bf16"] = round(row["ms"] / base, 3)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)


def guarded(bench: Bench, variant: str, size: tuple[int, int]) -> dict[str, Any]:
    """The row, or what stopped it: an error of pq_fx or torch, or the time limit."""
    place = {"label": variant, "size": "{}x{}".format(*size)}
    bench.get(variant.partition("+")[0])
    signal.alarm(bench.args.limit)
    try:
        return place | bench.run(variant, size)
    except (RuntimeError, pq_fx.errors.PQError, TooLong) as error:
        return place | {"error": f"{type(error).__name__}: {error}"[:600]}
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main()
