"""Random graphs in number: folds, observers and lowering on each (tests/graphs.py, tests/graph_properties.py).

    python bench/fuzz_graphs.py --graphs 10000 --out bench/results/fuzz_graphs.json

Each graph is made from its own seed, so a counterexample is reproduced by `--first SEED --graphs 1`. Every fourth
graph is also quantized and lowered. `--shards` processes share the work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from graph_properties import check, check_lowering
from graphs import random_network

LOWERED = 4  # one graph in so many is lowered too


def run(first: int, count: int, step: int) -> tuple[Counter, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    counts: Counter = Counter()
    wrong: list[dict[str, Any]] = []
    for seed in range(first, first + count, step):
        rng = np.random.default_rng(seed)
        net = random_network(lambda n, rng=rng: int(rng.integers(n)))
        counts["tried"] += 1
        counts.update(f"move {m}" for m in net.moves)
        for property_ in (check, check_lowering) if seed % LOWERED == 0 else (check,):
            try:
                property_(net, seed, counts)
            except Exception:
                wrong.append(
                    {"seed": seed, "moves": net.moves, "error": traceback.format_exc(limit=-2)}
                )
                print(json.dumps(wrong[-1]), flush=True)
        if counts["tried"] % 500 == 0:
            print(f"{counts['tried']} tried, {len(wrong)} wrong", flush=True)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    counts: Counter = Counter()
    wrong: list[dict[str, Any]] = []
    if args.shards == 1:
        counts, wrong = run(args.first, args.graphs, 1)
    else:
        with ProcessPoolExecutor(args.shards) as pool:
            jobs = [
                pool.submit(run, args.first + i, args.graphs - i, args.shards)
                for i in range(args.shards)
            ]
            for job in jobs:
                some, bad = job.result()
                counts += some
                wrong += bad
    named = {
        prefix: {
            k.removeprefix(prefix + " "): n
            for k, n in counts.most_common()
            if k.startswith(prefix + " ")
        }
        for prefix in ("op", "move")
    }
    result = {
        "tried": counts["tried"],
        "wrong": len(wrong),
        "counterexamples": wrong,
        "foldable_share": round(counts["foldable points"] / max(counts["points"], 1), 4),
        **{
            k.replace(":", "").replace(" ", "_"): n
            for k, n in counts.items()
            if " " not in k or k.split()[0] not in named
        },
        "moves": named["move"],
        "operations": named["op"],
        "torch": torch.__version__,
        "device": "cpu",
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(
        json.dumps({k: v for k, v in result.items() if k not in ("operations", "counterexamples")})
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
