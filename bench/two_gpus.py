"""One denoising step of FLUX.1-dev on one and on two GPUs of a host, bf16 and quantized.

    torchrun --standalone --nproc-per-node=2 bench/two_gpus.py --out bench/results/two_gpus_h100.json

Published width (24 heads of 128), `--layers` blocks (6 + 12 of 19 + 38, so that it is quantized in seconds), random
weights with planted outlier channels, blocks compiled. The first process quantizes and saves; both load the folder, as
a user's launch does. A row is a model and a way:

    one       one GPU works, the other waits
    data      both work, each on a picture of its own (the same call in two processes)
    ulysses   diffusers' context parallelism, `ulysses_degree=2`: tokens split, in attention heads
    ring      `ring_degree=2`, with `--attention` (bf16 flash attention of PyTorch, which gives the log-sum-exp)

`+graph` replays the way's compiled step as one CUDA graph, communication inside. Times are CUDA events of the first
process, median of `--steps`; "data" counts the steps of both over the longer time. Every result, of both processes, is
compared with that of "one" in the first; "times_one" is the throughput over that of "one" (launched or a graph alike).
Rows are written as they come; what does not compile runs eagerly and says so. Runs with one `--folder` quantize once.

`--host` adds what the processor does in a launched step: `host_ms` until the call returns, the longest calls of CUDA's
runtime and of Python. `--fake` runs one process in a group of two whose communication does nothing (PyTorch's "fake"
group): on one GPU it times one process's share, without what is exchanged; outputs mean nothing and are not compared.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import triton
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from diffusers.hooks.context_parallel import remove_context_parallel
from step_models import build, step_inputs
from torch import Tensor, nn

import pq_fx

NAME = "flux.1-dev"
WAYS = "one data ulysses ring"
PICTURE = 28  # steps


class Bench:
    """One of the two processes: its device, the inputs, the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        cuda = args.device == "cuda"
        if args.fake:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        else:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=90))
        self.rank, self.args = dist.get_rank(), args
        self.device = torch.device(args.device, self.rank if cuda else None)
        if cuda:
            torch.cuda.set_device(self.device)
        else:  # diffusers asks for the accelerator's count; a trial has none
            torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]
        self.inputs = step_inputs(NAME, args.side, 1, str(self.device))
        self.alone: Tensor | None = None  # what one GPU gives
        self.rates: dict[str, float] = {}  # pictures a second of one GPU, launched and as a graph
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if cuda else args.device,
            "devices": dist.get_world_size(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "diffusers": diffusers.__version__,
            **{
                k: getattr(args, k)
                for k in ("layers", "side", "preset", "method", "attention", "eager", "fake")
            },
            "picture_steps": PICTURE,
            "rows": [],
        }

    def note(self, **found: Any) -> None:
        """Keep and print what was found; the first process writes the file."""
        self.result.update(found)
        if self.rank == 0:
            print(json.dumps(found or self.result["rows"][-1]), flush=True)
            self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def float_model(self) -> FluxTransformer2DModel:
        """The bf16 model; equal in both processes."""
        args = self.args
        return build(NAME, args.layers, args.tiny, str(self.device))  # type: ignore[return-value]

    def quantized(self, folder: Path) -> FluxTransformer2DModel:
        """Quantized and saved by the first process unless it is there, loaded by both."""
        if self.rank == 0 and not (folder / "config.json").exists():
            start = time.perf_counter()
            model = self.float_model()
            config = pq_fx.QuantConfig.preset(
                self.args.preset, method=self.args.method, alphas=(0.5,)
            )
            # The sampled rows would be seeded by the process; here one calibrates alone.
            quantizer = pq_fx.prepare(model, config)
            with quantizer.calibrate(progress=False):
                model(**step_inputs(NAME, min(256, self.args.side), 1, str(self.device)))
            report = quantizer.convert()
            pq_fx.save(model, folder)
            self.note(quantize_and_save_s=round(time.perf_counter() - start, 1))
            print(report.summary, flush=True)
            del model, quantizer, report
            self.free()
        dist.barrier()
        model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        return model.to(self.device)

    def free(self) -> None:
        """Forget compiled code and free its memory."""
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def step(self, model: nn.Module) -> Callable[[], Tensor]:
        """A call of the model whose result is complete when the stream is."""
        return lambda: model(**self.inputs)[0] + 0  # waits for what is still being gathered

    def compiled(self, model: FluxTransformer2DModel, label: str) -> Callable[[], Tensor]:
        """The model's step, its blocks compiled and warm; eager where compiling fails."""
        self.free()
        for module in model.modules():
            module._compiled_call_impl = None
        options: dict[str, Any] = {} if label == "bf16" else {"backend": "permuquant"}
        step = self.step(model)
        if self.args.eager:
            step()
            return step
        try:
            model.compile_repeated_blocks(fullgraph=True, **options)
            step()
        except Exception as error:  # whatever the compiler says; the row says it on
            self.row["eager_because"] = f"{type(error).__name__}: {error}"[:500]
            torch.compiler.reset()
            for module in model.modules():
                module._compiled_call_impl = None
        for _ in range(3):
            step()
        return step

    def times(self, step: Callable[[], object]) -> list[float]:
        """Milliseconds of each of `--steps` calls."""
        found = []
        for _ in range(self.args.steps):
            if self.args.device != "cuda":
                start = time.perf_counter()
                step()
                found.append((time.perf_counter() - start) * 1e3)
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return found

    def alone_on_one(self, step: Callable[[], Tensor]) -> None:
        """Time the first process while the other waits."""
        if self.rank == 0:
            self.rated(self.times(step))
        dist.barrier()

    def both(self, step: Callable[[], Tensor]) -> None:
        """Time both processes at once, each at its own work."""
        dist.barrier()
        times = self.times(step)
        longest = torch.tensor([sum(times)], device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        self.rated(times, dist.get_world_size() * len(times) / longest.item())

    def together(self, step: Callable[[], Tensor]) -> None:
        """Time a step that both processes share."""
        dist.barrier()
        self.rated(self.times(step))

    def rated(self, times: list[float], steps_a_ms: float = 0.0) -> None:
        """Fill the row from the milliseconds of some steps; a step at a time unless `steps_a_ms` is given."""
        median = statistics.median(times)
        rate = 1e3 * (steps_a_ms or 1 / median) / PICTURE
        way, _, graph = self.row["way"].partition("+")
        if way == "one":
            self.rates[graph] = rate
        self.row |= {"ms": round(median, 2), "ms_min": round(min(times), 2)}
        self.row["pictures_a_second"] = float(f"{rate:.4g}")
        if graph in self.rates:
            self.row["times_one"] = round(rate / self.rates[graph], 3)

    def compare(self, got: Tensor) -> None:
        """Note how far the processes' results are from that of one GPU; stop where one is not finite."""
        if self.args.fake:
            return
        if not got.isfinite().all():
            raise SystemExit(f"{self.row}: output is not finite")
        if self.alone is None:
            if not self.row["way"].startswith("one"):
                return  # "one" was not asked for
            self.alone = got.clone()
            dist.broadcast(self.alone, 0)
        far = (got.float() - self.alone.float()).norm() / self.alone.float().norm()
        dist.all_reduce(far, dist.ReduceOp.MAX)
        self.row["relative_difference_to_one"] = float(f"{far.item():.2e}")

    @torch.no_grad()
    def run(self, label: str, model: FluxTransformer2DModel) -> None:
        """All ways of one model, those that share a compiled step one after the other."""
        self.alone, self.rates = None, {}
        native = model.transformer_blocks[0].attn.processor._attention_backend
        for way in ("one", "ulysses", "ring"):
            wanted = [w for w in self.args.ways if w.split("+")[0] == way]
            wanted += ["data"] * (way == "one" and "data" in self.args.ways)
            if not wanted:
                continue
            start = time.perf_counter()
            self.row = {"model": label, "way": way}
            if way != "one":
                model.set_attention_backend(self.args.attention if way == "ring" else "native")
                model.enable_parallelism(config=self.parallel(way))
            step = self.compiled(model, label)
            first = round(time.perf_counter() - start, 1)
            shared = self.row | {"compile_and_4_steps_s": first}
            for name in wanted:
                self.row = shared | {"way": name}
                self.measure(name, step)
                self.result["rows"].append(self.row)
                self.note()
            if way != "one":
                self.undo(model, native)

    def measure(self, name: str, step: Callable[[], Tensor]) -> None:
        """One row."""
        how = {"one": self.alone_on_one, "data": self.both}.get(name.split("+")[0], self.together)
        if not name.endswith("+graph"):
            self.compare(step())
            how(step)
            return self.look_at_host(step) if self.args.host else None
        if self.args.device != "cuda":
            return self.row.update(graph="no CUDA")
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        dist.barrier()
        try:
            # NCCL's watchdog asks the driver things in a thread of its own meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                made = step()
        except RuntimeError as error:
            return self.row.update(graph=f"not captured: {error}"[:300])
        graph.replay()
        self.compare(made)
        how(graph.replay)  # type: ignore[arg-type]

    def look_at_host(self, step: Callable[[], Tensor]) -> None:
        """What the processor does in a step: milliseconds until the call returns, CUDA's calls, Python's."""
        dist.barrier()
        returned = []
        for _ in range(5):
            self.wait()
            start = time.perf_counter()
            step()
            returned.append((time.perf_counter() - start) * 1e3)
        self.wait()
        self.row["host_ms"] = round(statistics.median(returned), 2)
        with torch.profiler.profile() as seen:
            step()
            self.wait()
        events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
        self.row["host_calls"] = {
            e.key[:60]: [e.count, round(e.self_cpu_time_total / 1e3, 2)] for e in events[:24]
        }
        profiler = cProfile.Profile()
        profiler.runcall(step)
        self.wait()
        found: Any = pstats.Stats(profiler)
        rows = sorted(found.stats.items(), key=lambda item: -item[1][2])
        self.row["python"] = {
            f"{Path(file).name}:{line} {name}"[:70]: [calls, round(own * 1e3, 2)]
            for (file, line, name), (_, calls, own, _, _) in rows[:16]
        }

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def parallel(self, way: str) -> ContextParallelConfig:
        """diffusers' configuration of a way."""
        degrees = {"ring_degree": 1, "ulysses_degree": 1} | {f"{way}_degree": dist.get_world_size()}
        config = ContextParallelConfig(**degrees)
        if self.args.device == "cpu":
            config.mesh = dist.device_mesh.init_device_mesh(
                "cpu", tuple(degrees.values()), mesh_dim_names=("ring", "ulysses")
            )
        return config

    @staticmethod
    def undo(model: FluxTransformer2DModel, attention: Any) -> None:
        """The model without its parallelism, for the next way."""
        remove_context_parallel(model, model._cp_plan)
        model._parallel_config = None
        for module in model.modules():
            if hasattr(module, "processor"):
                module.processor._parallel_config = None
                module.processor._attention_backend = attention


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["w4a4", "bf16"])
    parser.add_argument("--ways", nargs="+", default=WAYS.split())
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 12])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--preset", default="w4a4-int4")
    parser.add_argument("--method", default="permuquant-h")
    parser.add_argument("--attention", default="_native_flash")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="of the quantized model, made where missing")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--host", action="store_true", help="look at the processor's part too")
    parser.add_argument("--fake", action="store_true", help="one process, nothing exchanged")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the script")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    bench = Bench(args)
    where = [args.folder or Path(tempfile.mkdtemp()) / "model"]
    dist.broadcast_object_list(where)
    with torch.no_grad():
        for label in args.models:
            start = time.perf_counter()
            model = bench.float_model() if label == "bf16" else bench.quantized(where[0])
            bench.note(**{f"{label}_ready_s": round(time.perf_counter() - start, 1)})
            bench.run(label, model)
            del model
            bench.free()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
