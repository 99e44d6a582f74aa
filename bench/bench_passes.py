"""CPU seconds of each pass on FLUX.1 graphs of 5+10, 10+19 and 19+38 blocks, and how they grow.

    python bench/bench_passes.py --out bench/results/passes.json

The float model's graph is retraced, searched for regions, observed and verified (with a permutation in every
region); then the same model with empty quantized linears is retraced, lowered and verified. "tiny" has 3 heads of 16
channels, "real" the published width; both on the meta device, so the time is that of the passes, not of tensors.
Dynamo's own time is given beside. Seconds are CPU seconds of one thread, so that other work on the machine does not
count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from models import MODELS

from pq_fx.example_inputs import example_inputs
from pq_fx.kernels import devices
from pq_fx.kernels.formats import get_format
from pq_fx.modules import ActivationQuantizer, QuantLinear
from pq_fx.passes import (
    find_regions,
    insert_observers,
    lower,
    parameter_inputs,
    retrace,
    verify_folds,
    verify_graph,
)
from pq_fx.passes.regions import RegionMap

DEPTHS = ((5, 10), (10, 19), (19, 38))
WIDTHS: dict[str, dict[str, Any]] = {
    "tiny": {"num_attention_heads": 3, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
    "real": {},
}


class Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call the function and book its seconds under `name`."""
        # A collection of Dynamo's garbage is not the pass's time; its own garbage still is.
        gc.collect()
        start = time.process_time()
        result = function(*args)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
        return result


def trace(
    model: nn.Module, inputs: dict[str, Any], backend: Callable[..., Any], clock: Clock
) -> None:
    """Run Dynamo with `backend`; what is not spent in the backend is booked as "dynamo"."""
    torch.compiler.reset()

    def timed(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.process_time()
        result = backend(gm, inputs)
        clock.seconds["dynamo"] = clock.seconds.get("dynamo", 0.0) - (time.process_time() - start)
        return result

    with torch.no_grad():
        start = time.process_time()
        torch.compile(model, backend=timed, fullgraph=True, dynamic=False)(**inputs)
        clock.seconds["dynamo"] = clock.seconds.get("dynamo", 0.0) + time.process_time() - start


def measure(layers: int, singles: int, width: dict[str, Any]) -> dict[str, Any]:
    case = MODELS["flux"]
    with torch.device("meta"):
        model = case.build(
            case.config | {"num_layers": layers, "num_single_layers": singles} | width
        )
    nn.Module.to(model, torch.bfloat16)
    inputs = example_inputs(model, case.sizes)
    clock, row = Clock(), {"blocks": [layers, singles]}
    names = {id(p): n for n, p in model.named_parameters()}
    points: list[tuple[str, ...]] = []

    def watch(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        row["dynamo_nodes"] = len(gm.graph.nodes)
        traced = clock("retrace", retrace, gm)
        params = parameter_inputs(traced)
        found: RegionMap = clock("find_regions", find_regions, traced, params)
        row.update(
            nodes=len(traced.graph.nodes), regions=len(found.regions), linears=len(found.linears)
        )
        for region in found.regions:
            for point in region.points:
                if found.linears[point.name].treatment == "quantize":
                    points.append(tuple(names[id(params[n])] for n in point.linears))
        perms = {r.name: shuffled(r.blocks) for r in found.regions if r.foldable}
        clock("verify_folds", verify_folds, traced, params, found.regions, perms)
        seeds = {name: 0 for name in found.sources}
        clock("insert_observers", insert_observers, traced, found.sources, seeds)
        clock("verify_graph", verify_graph, traced)
        return gm.forward

    trace(model, inputs, watch, clock)
    swap(model, points)

    def finish(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        traced = clock("retrace_quantized", retrace, gm)
        row["lowered"] = vars(clock("lower", lower, traced))
        clock("verify_lowered", verify_graph, traced)
        return gm.forward

    trace(model, inputs, finish, clock)
    row["seconds"] = {k: round(v, 3) for k, v in clock.seconds.items()}
    row["passes_seconds"] = round(sum(v for k, v in clock.seconds.items() if k != "dynamo"), 2)
    return row


def shuffled(blocks: np.ndarray) -> np.ndarray:
    """A permutation that moves channels within their blocks."""
    rng, perm = np.random.default_rng(0), np.arange(blocks.size)
    for block in np.unique(blocks[blocks >= 0]):
        where = np.flatnonzero(blocks == block)
        perm[where] = rng.permutation(where)
    return perm


def swap(model: nn.Module, points: list[tuple[str, ...]]) -> None:
    """Replace each point's linears by empty quantized ones that share an input quantizer."""
    fmt = get_format("int4", 32)
    for weights in points:
        quantizer = None
        for name in weights:
            fqn = name.removesuffix(".weight")
            old = model.get_submodule(fqn)
            k, n = old.in_features, old.out_features
            quantizer = quantizer or ActivationQuantizer.empty(k, fmt.key, 0, True, False, "meta")
            new = QuantLinear.empty(k, n, old.bias is not None, fmt.key, torch.bfloat16, "meta")
            new.input_quantizer = quantizer
            parent, _, child = fqn.rpartition(".")
            setattr(model.get_submodule(parent), child, new.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--blocks", type=int, default=3, help="how many of the three depths")
    parser.add_argument("--width", choices=[*WIDTHS, "both"], default="both")
    args = parser.parse_args()
    devices.TABLE["meta"] = devices.TABLE["cpu"]  # lowering without a device: shapes only
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "rows": [],
    }
    measure(1, 1, WIDTHS["tiny"])  # imports and caches
    for width in WIDTHS if args.width == "both" else [args.width]:
        for layers, singles in DEPTHS[: args.blocks]:
            row = {"width": width, **measure(layers, singles, WIDTHS[width])}
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
