"""Every op of pq_fx, and GPTQ's kernel, on a CUDA device against the reference on the CPU; writes a JSON result.

    python bench/check_kernels.py --out bench/results/check_kernels_h100.json --random 1000 --canaries
    compute-sanitizer --tool memcheck python bench/check_kernels.py --small --out /tmp/small.json
    TRITON_INTERPRET=1 python bench/check_kernels.py --small --interpret --out /tmp/small.json

Packing is exact, and so are codes and scales where no norm or transcendental function comes first;
outputs are held to the bounds of tests/thresholds.py. Fresh random inputs at odd sizes, strided
views, 0 and 1 rows; outputs are poisoned before each call (PyTorch's fill of uninitialized memory).
The first failure or NaN stops the run with an error that names the case.

--random N tries N more random shapes a kernel and counts what is wrong (bench/random_shapes.py);
--canaries puts guard bytes around every input and output of those. --only takes kernels whose name holds a word.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import kernel_rounding
import random_shapes
import torch
from kernel_cases import (
    KEYS,
    SMALL_KEYS,
    Call,
    act_cases,
    interpreted,
    linear_cases,
    norm_cases,
    on_cuda,
    quantize_cases,
    weight_only_cases,
)
from timing import made_with

GROUPS = {
    "quantize": quantize_cases,
    "act_quantize": act_cases,
    "norm_quantize": norm_cases,
    "linear": linear_cases,
    "linear_weight_only": weight_only_cases,
    "round_columns": kernel_rounding.round_cases,
}


def run_one(name: str, key: str, small: bool, seed: int, call: Call) -> list[dict[str, Any]]:
    """The checks of one op and one format; raises CheckFailed at the first disagreement."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return list(GROUPS[name](key, small, call))


def run(
    small: bool, seed: int, jobs: int = 1, call: Call = on_cuda, only: Sequence[str] = ("",)
) -> list[dict[str, Any]]:
    """The checks of ops that `only` names, in `jobs` processes (most of the time is Triton compiling)."""
    names = [name for name in GROUPS if any(word in name for word in only)]
    few = {"round_columns": kernel_rounding.SMALL_KEYS}
    tasks = [
        (name, key) for name in names for key in (few.get(name, SMALL_KEYS) if small else KEYS)
    ]
    if jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            futures = [pool.submit(run_one, *task, small, seed, call) for task in tasks]
            of = dict(zip(futures, tasks, strict=True))
            for future in as_completed(futures):
                failed = future.exception()
                print(f"{of[future]} {'FAILED ' + str(failed) if failed else 'ok'}", flush=True)
            found = [future.result() for future in futures]
    else:
        found = [run_one(*task, small, seed, call) for task in tasks]
    for name in names:
        part = [c for (n, _), cs in zip(tasks, found, strict=True) for c in cs if n == name]
        worst = max(c.get("codes_differ", c.get("relative_error", 0.0)) for c in part)
        print(f"{name}: {len(part)} checks, worst {worst:.2e}", flush=True)
    return [check for checks in found for check in checks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--small", action="store_true", help="few small cases, for compute-sanitizer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpret", action="store_true", help="on the CPU; no CUDA device")
    parser.add_argument("--random", type=int, default=0, help="random shapes a kernel")
    parser.add_argument(
        "--canaries", action="store_true", help="guard bytes around the random shapes"
    )
    parser.add_argument("--only-random", action="store_true", help="leave the fixed checks out")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", nargs="+", default=[""], help="words of kernels' names")
    args = parser.parse_args()
    begin = time.perf_counter()
    call = interpreted if args.interpret else on_cuda
    device = "cpu" if args.interpret else "cuda"
    checks = [] if args.only_random else run(args.small, args.seed, args.jobs, call, args.only)
    result: dict[str, Any] = {
        **made_with("Triton interpreter" if args.interpret else "cuda"),
        "seed": args.seed,
    }
    if args.random:
        result["random_shapes"] = random_shapes.run(
            args.random, args.seed, args.jobs, device, args.canaries, args.only
        )
    result["seconds"] = round(time.perf_counter() - begin, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # One line a check.
    lines = ",\n  ".join(json.dumps(check) for check in checks)
    head = json.dumps(result, indent=1).removesuffix("\n}")
    args.out.write_text(f'{head},\n "checks": [\n  {lines}\n ]\n}}\n')
    print(f"{len(checks)} checks passed on {result['device']}, torch {result['torch']}")
    wrong = sum(row["wrong"] for row in result.get("random_shapes", {}).values())
    if wrong:
        sys.exit(f"{wrong} random shapes are wrong")


if __name__ == "__main__":
    main()
